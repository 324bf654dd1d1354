// 16-bit draws for mask elements, in memory; draws.h makes them.
#include "draws.h"
#include "kernels.h"

namespace subnet {
namespace SUBNET_CAPABILITY {

void random_bits(const RandomBits& p, int64_t group_begin, int64_t group_end) {
  const int64_t per_sample = p.rows * ((p.columns + 7) / 8);
  for (int64_t at = group_begin; at < group_end;) {
    const int64_t sample = at / per_sample, begin = at % per_sample;
    const int64_t end = per_sample - begin < group_end - at ? per_sample : begin + (group_end - at);
    const uint32_t counted = p.seed_stride ? 0 : p.first_sample + (uint32_t)sample;
    uint16_t* out = p.out + sample * p.rows * p.columns;
    for_draws({(uint64_t)p.seed[sample * p.seed_stride], p.offset, counted}, p.columns, begin, end,
              [&](int64_t row, int64_t column, int64_t count, const uint16_t* draws) {
                __builtin_memcpy(out + row * p.columns + column, draws, 2 * count);
              });
    at += end - begin;
  }
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
