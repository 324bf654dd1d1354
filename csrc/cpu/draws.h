// 16-bit draws in registers; subnet_kernels/random.py is the definition. One Philox call serves the eight columns of a
// group; a register holds the same word of as many groups as it has lanes.
#pragma once

#include "../philox.h"
#include "simd.h"

namespace subnet {
namespace SUBNET_CAPABILITY {

typedef uint64_t VectorLong __attribute__((vector_size(kLanes * 4)));

struct VectorWords {
  using Word = VectorBits;

  static SUBNET_INLINE VectorLong product(VectorLong a, uint32_t b) {  // of the lower halves
#if defined(__AVX512F__)
    return (VectorLong)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (VectorLong)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    return (a & 0xffffffffu) * b;
#endif
  }
  // of the even lanes, and of the odd ones moved down; where the halves of a 64-bit lane are by endianness
  static SUBNET_INLINE VectorBits high_product(VectorBits a, uint32_t b) {
    const VectorLong lower = product((VectorLong)a, b), upper = product((VectorLong)a >> 32, b);
    return (VectorBits)((lower >> 32) | (upper & 0xffffffff00000000u));
  }
};

// Which draws: those of one sample under one key.
struct DrawKey {
  uint64_t seed;
  uint32_t offset, sample;
};

constexpr int64_t kGroupsAtOnce = kLanes, kDrawsAtOnce = 8 * kGroupsAtOnce;

// out[0 .. kDrawsAtOnce) = the draws of the groups first, first + 1, ... of a row.
SUBNET_INLINE void draw(const DrawKey& key, uint32_t row, uint32_t first, uint16_t* out) {
#if (defined(__AVX512F__) || defined(__AVX2__)) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  // Interleaving words within 128 bits leaves in register r, at 128-bit place j, what lane 4j + r drew: so this lane is
  // given group r*places + j, and the four registers are stored as they are.
  constexpr int places = kLanes / 4;
  VectorBits groups;
  for (int lane = 0; lane < kLanes; ++lane) groups[lane] = first + (uint32_t)(lane % 4 * places + lane / 4);
  const auto drawn = Philox<VectorWords>::draw(
      {{VectorBits{} + row, groups, VectorBits{} + key.sample, VectorBits{} + key.offset}}, (uint32_t)key.seed,
      (uint32_t)(key.seed >> 32));
#if defined(__AVX512F__)
  const auto a = (__m512i)drawn.word[0], b = (__m512i)drawn.word[1], c = (__m512i)drawn.word[2],
             d = (__m512i)drawn.word[3];
  const __m512i low_ab = _mm512_unpacklo_epi32(a, b), low_cd = _mm512_unpacklo_epi32(c, d);
  const __m512i high_ab = _mm512_unpackhi_epi32(a, b), high_cd = _mm512_unpackhi_epi32(c, d);
  const __m512i all[4] = {_mm512_unpacklo_epi64(low_ab, low_cd), _mm512_unpackhi_epi64(low_ab, low_cd),
                          _mm512_unpacklo_epi64(high_ab, high_cd), _mm512_unpackhi_epi64(high_ab, high_cd)};
#else
  const auto a = (__m256i)drawn.word[0], b = (__m256i)drawn.word[1], c = (__m256i)drawn.word[2],
             d = (__m256i)drawn.word[3];
  const __m256i low_ab = _mm256_unpacklo_epi32(a, b), low_cd = _mm256_unpacklo_epi32(c, d);
  const __m256i high_ab = _mm256_unpackhi_epi32(a, b), high_cd = _mm256_unpackhi_epi32(c, d);
  const __m256i all[4] = {_mm256_unpacklo_epi64(low_ab, low_cd), _mm256_unpackhi_epi64(low_ab, low_cd),
                          _mm256_unpacklo_epi64(high_ab, high_cd), _mm256_unpackhi_epi64(high_ab, high_cd)};
#endif
  __builtin_memcpy(out, all, sizeof(all));
#else
  VectorBits lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  const auto drawn = Philox<VectorWords>::draw(
      {{VectorBits{} + row, lanes + first, VectorBits{} + key.sample, VectorBits{} + key.offset}}, (uint32_t)key.seed,
      (uint32_t)(key.seed >> 32));
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int k = 0; k < 4; ++k) {
      out[8 * lane + 2 * k] = (uint16_t)drawn.word[k][lane];
      out[8 * lane + 2 * k + 1] = (uint16_t)(drawn.word[k][lane] >> 16);
    }
  }
#endif
}

// body(row, column, count, draws) over the groups [begin, end) of eight columns, counted row by row; a call's columns lie
// in one row and are kDrawsAtOnce but at the end of a row or range.
template <class Body>
SUBNET_INLINE void for_draws(const DrawKey& key, int64_t columns, int64_t begin, int64_t end, const Body& body) {
  const int64_t groups = (columns + 7) / 8;
  alignas(64) uint16_t draws[kDrawsAtOnce];
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / groups, first = at % groups;
    const int64_t last = groups - first < end - at ? groups : first + (end - at);
    for (int64_t group = first; group < last; group += kGroupsAtOnce) {
      const int64_t until = group + kGroupsAtOnce < last ? group + kGroupsAtOnce : last;
      const int64_t column = 8 * group, stop = 8 * until < columns ? 8 * until : columns;
      draw(key, (uint32_t)row, (uint32_t)group, draws);
      body(row, column, stop - column, draws);
    }
    at += last - first;
  }
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
