// One SIMD register of fp32 and what the kernels do with it, for the instruction set that this file is compiled for.
//
// setup.py compiles every kernel file once per capability, with SUBNET_CAPABILITY set to avx512, avx2 or portable and
// the flags that go with it; each copy lives in a namespace of that name. Vector types are GCC's and clang's own
// (`vector_size`), so the portable copy is SSE2 on x86 and NEON on Arm. Intrinsics appear only where the compiler has no
// expression for an instruction.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../params.h"
#include "../rounding.h"

namespace subnet {
namespace SUBNET_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t VectorInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VectorBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VectorHalf __attribute__((vector_size(kLanes * 2)));
typedef float HalfVector __attribute__((vector_size(kLanes * 2)));      // half as many floats ...
typedef double VectorDouble __attribute__((vector_size(kLanes * 4)));   // ... widened to a whole register

template <class V, class T>
SUBNET_INLINE V load_as(const T* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <class V, class T>
SUBNET_INLINE void store_as(T* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

SUBNET_INLINE Vector broadcast(float value) { return Vector{} + value; }

// Two values worked on in step; nested, four. A processor's scheduler holds about a hundred waiting instructions, one or
// two runs of a long chain (sigmoid, root, quotient): only what lies side by side in the code overlaps.
template <class T>
struct Two {
  T a, b;
};

#define SUBNET_TWO_OPERATOR(op)                                                                                       \
  template <class T>                                                                                                  \
  SUBNET_INLINE Two<T> operator op(Two<T> x, Two<T> y) {                                                              \
    return {x.a op y.a, x.b op y.b};                                                                                  \
  }                                                                                                                   \
  template <class T, class C>                                                                                         \
  SUBNET_INLINE Two<T> operator op(Two<T> x, C same) {                                                                \
    return {x.a op same, x.b op same};                                                                                \
  }                                                                                                                   \
  template <class T, class C>                                                                                         \
  SUBNET_INLINE Two<T> operator op(C same, Two<T> y) {                                                                \
    return {same op y.a, same op y.b};                                                                                \
  }
SUBNET_TWO_OPERATOR(+)
SUBNET_TWO_OPERATOR(-)
SUBNET_TWO_OPERATOR(*)
SUBNET_TWO_OPERATOR(/)
#undef SUBNET_TWO_OPERATOR

template <class T>
SUBNET_INLINE Two<T> operator-(Two<T> x) {
  return {-x.a, -x.b};
}

// function(register, ...) for each register of the arguments.
template <class F, class... R>
SUBNET_INLINE Vector each(const F& function, Vector x, R... rest) {
  return function(x, rest...);
}

template <class F, class T, class... R>
SUBNET_INLINE Two<T> each(const F& function, Two<T> x, R... rest) {
  return {each(function, x.a, rest.a...), each(function, x.b, rest.b...)};
}

// Rounded correctly, as IEEE 754 asks.
template <class F>
SUBNET_INLINE F square_root(F x) {
  return each(
      [](Vector a) {
#if defined(__AVX512F__)
        return (Vector)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
        return (Vector)_mm256_sqrt_ps((__m256)a);
#else
        Vector root;
        for (int lane = 0; lane < kLanes; ++lane) root[lane] = __builtin_sqrtf(a[lane]);
        return root;
#endif
      },
      x);
}

// numerator / (sqrt(v) * scale + eps) for v that is 0, at least 2^-126, infinite or NaN, and a denominator in the normal
// range: AdamW's quotient. Within 4 units in the last place.
template <class F>
SUBNET_INLINE F quick_over_root(F numerator, F v, float scale, float eps) {
#if defined(__AVX512F__)
  // 14 bits of root and of reciprocal, and one Newton step each, at half the time of the processor's own.
  return each(
      [=](Vector n, Vector v) {
        const __m512 given = (__m512)v, half = _mm512_set1_ps(0.5f);
        const __m512 estimate = _mm512_rsqrt14_ps(_mm512_max_ps(_mm512_set1_ps(0x1p-126f), given));  // given if NaN
        __m512 root = _mm512_mul_ps(given, estimate);
        root = _mm512_fmadd_ps(_mm512_fnmadd_ps(root, root, given), _mm512_mul_ps(estimate, half), root);
        const __m512 d = _mm512_fmadd_ps(root, _mm512_set1_ps(scale), _mm512_set1_ps(eps));
        const __m512 rough = _mm512_rcp14_ps(d);
        const __m512 x = _mm512_fmadd_ps(_mm512_fnmadd_ps(d, rough, _mm512_set1_ps(1.0f)), rough, rough);
        const __m512 quotient = _mm512_mul_ps((__m512)n, x);
        const __m512 corrected = _mm512_fmadd_ps(_mm512_fnmadd_ps(d, quotient, (__m512)n), x, quotient);
        const __mmask16 is_infinite = _mm512_cmp_ps_mask(given, _mm512_set1_ps(__builtin_inff()), _CMP_EQ_OQ);
        return (Vector)_mm512_mask_mul_ps(corrected, is_infinite, (__m512)n, _mm512_setzero_ps());
      },
      numerator, v);
#else
  return numerator / (square_root(v) * scale + eps);
#endif
}

// The policy of mask.h over F, one register or several in step.
// exp(r) = 1 + r + r^2 * P(r) on |r| <= ln(2)/2: own least-maximum fit, relative error 3.6e-9 with rounded coefficients.
template <class F>
struct RegisterMath {
  using Float = F;

  static SUBNET_INLINE Float absolute(Float z) {
    return each([](Vector a) { return (Vector)((VectorBits)a & 0x7fffffffu); }, z);
  }
  static SUBNET_INLINE Float where_nonnegative(Float z, Float a, Float b) {
    return each([](Vector z, Vector a, Vector b) { return z >= 0.0f ? a : b; }, z, a, b);
  }
  static SUBNET_INLINE Float where_positive(Float z, Float a, Float b) {
    return each([](Vector z, Vector a, Vector b) { return z > 0.0f ? a : b; }, z, a, b);
  }

  static SUBNET_INLINE Float exp_minus(Float a) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const Float shifted = a * -1.44269504f + kMagic;
    const Float n = shifted - kMagic;
    Float r = -a - n * 0.693359375f;  // exact: the constant has 9 bits, n at most 8
    r = r - n * -2.12194440e-4f;
    Float p = r * 1.3814540579915047e-3f + 8.36874544620514e-3f;
    p = p * r + 4.166838899254799e-2f;
    p = p * r + 1.666652113199234e-1f;
    p = p * r + 4.999999403953552e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return each(
        [](Vector a, Vector p, Vector n) {
          const __mmask16 is_kept = _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(kNegligible), _CMP_NGT_UQ);
          return (Vector)_mm512_maskz_scalef_ps(is_kept, (__m512)p, (__m512)n);
        },
        a, p, n);
#else
    return each(
        [](Vector a, Vector p, Vector shifted) {
          const VectorBits power = ((VectorBits)shifted - 0x4b400000u + 127u) << 23;  // 2^n, n >= -100
          return a > kNegligible ? Vector{} : p * (Vector)power;                      // a NaN is kept
        },
        a, p, shifted);
#endif
  }

  // 1/d for d = 1 + e, corrected for the rounding of that sum: within 1 ulp.
  static SUBNET_INLINE Float reciprocal_1p(Float e) {
    const Float d = 1.0f + e;
    const Float lost = e - (d - 1.0f);  // exact
#if defined(__AVX512F__)
    // 14 bits, then one Newton step, at a third of the division's time.
    const Float x = each([](Vector d) { return (Vector)_mm512_rcp14_ps((__m512)d); }, d);
    return x + x * ((1.0f - d * x) - lost * x);
#else
    const Float x = 1.0f / d;
    return x - (x * x) * lost;
#endif
  }
};

using VectorMath = RegisterMath<Vector>;
using VectorMask = Mask<VectorMath>;

// How each dtype is stored. Stores round to nearest even; a NaN stays a NaN.
struct Float32 {
  using Stored = float;
  static SUBNET_INLINE Vector load(const float* from) { return load_as<Vector>(from); }
  static SUBNET_INLINE void store(float* to, Vector value) { store_as(to, value); }
};

// 16-bit integers <-> the low halves of 32-bit ones. GCC 12 expands __builtin_convertvector into three times the work.
SUBNET_INLINE VectorBits widen(const uint16_t* from) {
#if defined(__AVX512F__)
  return (VectorBits)_mm512_cvtepu16_epi32(load_as<__m256i>(from));
#elif defined(__AVX2__)
  return (VectorBits)_mm256_cvtepu16_epi32(load_as<__m128i>(from));
#else
  return __builtin_convertvector(load_as<VectorHalf>(from), VectorBits);
#endif
}

SUBNET_INLINE void narrow(uint16_t* to, VectorBits value) {
#if defined(__AVX512F__)
  store_as(to, _mm512_cvtepi32_epi16((__m512i)value));
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_packus_epi32((__m256i)value, (__m256i)value);
  store_as(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(lanes, 0x08)));
#else
  store_as(to, __builtin_convertvector(value, VectorHalf));
#endif
}

struct BFloat16 {
  using Stored = uint16_t;
  static SUBNET_INLINE Vector load(const uint16_t* from) { return (Vector)(widen(from) << 16); }
  static SUBNET_INLINE void store(uint16_t* to, Vector value) {
    const VectorBits bits = (VectorBits)value;
    const VectorBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    narrow(to, (value == value ? rounded : bits | 0x400000u) >> 16);
  }
};

// bf16 of AdamW's moments: rounded by 16 random bits per element (rounding.h).
SUBNET_INLINE void store_bf16(uint16_t* to, Vector value, VectorBits random) {
  narrow(to, round_to_bf16_bits((VectorBits)value, random));
}

struct Float16 {
  using Stored = uint16_t;
#if defined(__AVX512F__)
  static SUBNET_INLINE Vector load(const uint16_t* from) { return (Vector)_mm512_cvtph_ps(load_as<__m256i>(from)); }
  static SUBNET_INLINE void store(uint16_t* to, Vector value) {
    store_as(to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__AVX2__)
  static SUBNET_INLINE Vector load(const uint16_t* from) { return (Vector)_mm256_cvtph_ps(load_as<__m128i>(from)); }
  static SUBNET_INLINE void store(uint16_t* to, Vector value) {
    store_as(to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static SUBNET_INLINE Vector load(const uint16_t* from) {
    const VectorInt half = (VectorInt)widen(from);
    const VectorInt magnitude = half & 0x7fff;
    const VectorInt normal = (magnitude << 13) + 0x38000000;
    const VectorInt special = (magnitude << 13) | 0x7f800000;  // infinity and NaN
    const VectorInt subnormal = (VectorInt)(__builtin_convertvector(magnitude, Vector) * 5.9604644775390625e-8f);
    const VectorInt finite = magnitude >= 0x400 ? normal : subnormal;
    return (Vector)((magnitude >= 0x7c00 ? special : finite) | (half & 0x8000) << 16);
  }
  static SUBNET_INLINE void store(uint16_t* to, Vector value) {
    const VectorInt bits = (VectorInt)value;
    const VectorInt magnitude = bits & 0x7fffffff;
    const VectorInt normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14: adding 0.5 leaves the value in units of 2^-24, rounded to nearest even.
    const VectorInt subnormal = (VectorInt)((Vector)magnitude + 0.5f) - 0x3f000000;
    const VectorInt finite = magnitude >= 0x38800000 ? normal : subnormal;
    const VectorInt infinite = VectorInt{} + 0x7c00;
    const VectorInt large = magnitude > 0x7f800000 ? VectorInt{} + 0x7e00 : infinite;
    const VectorInt half = magnitude >= 0x477ff000 ? large : finite;  // 65520 and above round to infinity
    narrow(to, (VectorBits)(half | ((bits >> 16) & 0x8000)));
  }
#endif
};

// The first `count` elements of a register; the others read as 0 and are not written.
template <class D>
SUBNET_INLINE Vector load_some(const typename D::Stored* from, int64_t count) {
  if (count == kLanes) return D::load(from);
  typename D::Stored buffer[kLanes] = {};
  __builtin_memcpy(buffer, from, count * sizeof(typename D::Stored));
  return D::load(buffer);
}

template <class D>
SUBNET_INLINE void store_some(typename D::Stored* to, Vector value, int64_t count) {
  if (count == kLanes) return D::store(to, value);
  typename D::Stored buffer[kLanes];
  D::store(buffer, value);
  __builtin_memcpy(to, buffer, count * sizeof(typename D::Stored));
}

using Four = Two<Two<Vector>>;  // kGroup elements

template <class D>
SUBNET_INLINE Four load_four(const typename D::Stored* from) {
  return {{D::load(from), D::load(from + kLanes)}, {D::load(from + 2 * kLanes), D::load(from + 3 * kLanes)}};
}

template <class D>
SUBNET_INLINE void store_four(typename D::Stored* to, Four value) {
  D::store(to, value.a.a);
  D::store(to + kLanes, value.a.b);
  D::store(to + 2 * kLanes, value.b.a);
  D::store(to + 3 * kLanes, value.b.b);
}

// A sum kept in double: registers are added in groups of four before they are widened, which costs two roundings.
struct Sum {
  VectorDouble low{}, high{};

  SUBNET_INLINE void add(Vector value) {
    HalfVector halves[2];
    __builtin_memcpy(halves, &value, sizeof(value));
    low += __builtin_convertvector(halves[0], VectorDouble);
    high += __builtin_convertvector(halves[1], VectorDouble);
  }
  SUBNET_INLINE void add_some(Vector value, int64_t count) {
    for (int lane = (int)count; lane < kLanes; ++lane) value[lane] = 0.0f;
    add(value);
  }
  SUBNET_INLINE double total() const {
    const VectorDouble both = low + high;
    double sum = 0;
    for (int lane = 0; lane < kLanes / 2; ++lane) sum += both[lane];
    return sum;
  }
};

// Calls body(D{}) with the storage class of a dtype.
template <class Body>
SUBNET_INLINE void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32: return body(Float32{});
    case Dtype::bfloat16: return body(BFloat16{});
    case Dtype::float16: return body(Float16{});
  }
}

constexpr int kGroup = 4 * kLanes;  // elements handled per turn of a main loop

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
