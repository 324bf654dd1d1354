// 16-bit draws for mask elements; subnet_kernels/random.py is the definition. One Philox call serves the eight columns of
// a group; a register holds the same word of as many groups as it has lanes.
#include "../philox.h"
#include "kernels.h"
#include "simd.h"

namespace subnet {
namespace SUBNET_CAPABILITY {
namespace {

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

}  // namespace

void random_bits(const RandomBits& p, int64_t group_begin, int64_t group_end) {
  const int64_t groups = (p.columns + 7) / 8;
  VectorBits lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  for (int64_t at = group_begin; at < group_end;) {
    const int64_t line = at / groups, first = at % groups;  // line: a row of a sample
    const int64_t last = groups - first < group_end - at ? groups : first + (group_end - at);
    const auto sample = (uint32_t)(line / p.rows), row = (uint32_t)(line % p.rows);
    const auto seed = (uint64_t)p.seed[sample * p.seed_stride];
    const uint32_t counted = p.seed_stride ? 0 : p.first_sample + sample;
    uint16_t* out = p.out + line * p.columns;
    for (int64_t group = first; group < last; group += kLanes) {
      const auto drawn = Philox<VectorWords>::draw({{VectorBits{} + row, lanes + (uint32_t)group, VectorBits{} + counted,
                                                     VectorBits{} + p.offset}},
                                                   (uint32_t)seed, (uint32_t)(seed >> 32));
      for (int lane = 0; lane < kLanes && group + lane < last; ++lane) {
        uint16_t eight[8];
        for (int k = 0; k < 4; ++k) {
          eight[2 * k] = (uint16_t)drawn.word[k][lane];
          eight[2 * k + 1] = (uint16_t)(drawn.word[k][lane] >> 16);
        }
        const int64_t column = 8 * (group + lane);
        __builtin_memcpy(out + column, eight, 2 * (p.columns - column < 8 ? p.columns - column : 8));
      }
    }
    at += last - first;
  }
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
