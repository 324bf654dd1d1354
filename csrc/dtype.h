#pragma once

namespace subnet {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace subnet
