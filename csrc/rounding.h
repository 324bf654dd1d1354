// Rounding to bf16 that is right on average, for host and device; subnet_kernels/rounding.py is the definition.
//
// U is uint32_t or a register of such: the expressions serve both.
#pragma once

#include <cstdint>

#include "mask.h"

namespace subnet {

// 32 bits for the element at `index` in storage order (mod 2^32) in step number `step`: the low half rounds the first
// moment, the high half the second. Source of the hash: C. Wellons, "Prospecting for hash functions" (2018), lowbias32.
template <class U>
SUBNET_INLINE U rounding_bits(U index, uint32_t step) {
  U x = index + step * 0x9e3779b9u;  // 2^32 / the golden ratio: far apart for neighbouring steps
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The bits of an fp32 value, rounded to bf16 by `random` in [0, 2^16): bf16 bits in the low half. The 16 bits that are
// dropped are added to `random` first and carry into those that stay. Infinities stay, a NaN stays a NaN.
template <class U>
SUBNET_INLINE U round_to_bf16_bits(U bits, U random) {
  return ((bits & 0x7fffffffu) > 0x7f800000u ? (bits | 0x400000u) : (bits + random)) >> 16;
}

}  // namespace subnet
