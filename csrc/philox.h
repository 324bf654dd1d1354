// Philox4x32 with 10 rounds: 128 random bits as a function of a counter and a key, for host and device.
//
// Over a policy `Math`, so that the same text serves a scalar and a SIMD register:
//   Word                                 uint32_t or a register of such
//   high_product(Word a, uint32_t b)     the upper 32 bits of the 64-bit product
// subnet_kernels/random.py says what mask draws take from it; the two agree to the bit.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#include "mask.h"

namespace subnet {

template <class Math>
struct Philox {
  using Word = typename Math::Word;

  struct Block {
    Word word[4];
  };

  static SUBNET_INLINE Block draw(Block counter, uint32_t key_low, uint32_t key_high) {
    Word a = counter.word[0], b = counter.word[1], c = counter.word[2], d = counter.word[3];
    for (int round = 0; round < 10; ++round) {
      const Word from_c = Math::high_product(c, 0xcd9e8d57u) ^ b ^ key_low;
      const Word from_a = Math::high_product(a, 0xd2511f53u) ^ d ^ key_high;
      b = c * 0xcd9e8d57u;
      d = a * 0xd2511f53u;
      a = from_c;
      c = from_a;
      key_low += 0x9e3779b9u;   // the golden ratio
      key_high += 0xbb67ae85u;  // sqrt(3) - 1
    }
    return {{a, b, c, d}};
  }
};

struct ScalarWords {
  using Word = uint32_t;
  static SUBNET_INLINE uint32_t high_product(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
};

}  // namespace subnet
