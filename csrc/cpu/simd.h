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

// exp(r) = 1 + r + r^2 * P(r) on |r| <= ln(2)/2: own least-maximum fit, relative error 3.6e-9 with rounded coefficients.
struct VectorMath {
  using Float = Vector;

  static SUBNET_INLINE Vector absolute(Vector z) { return (Vector)((VectorBits)z & 0x7fffffffu); }
  static SUBNET_INLINE Vector where_nonnegative(Vector z, Vector a, Vector b) { return z >= 0.0f ? a : b; }
  static SUBNET_INLINE Vector where_positive(Vector z, Vector a, Vector b) { return z > 0.0f ? a : b; }

  static SUBNET_INLINE Vector exp_minus(Vector a) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    a = a > 110.0f ? broadcast(110.0f) : a;  // exp(-104) already rounds to 0; a NaN passes
    const Vector shifted = a * -1.44269504f + kMagic;
    const Vector n = shifted - kMagic;
    Vector r = -a - n * 0.693359375f;  // exact: the constant has 9 bits, n at most 8
    r = r - n * -2.12194440e-4f;
    Vector p = broadcast(1.3814540579915047e-3f);
    p = p * r + 8.36874544620514e-3f;
    p = p * r + 4.166838899254799e-2f;
    p = p * r + 1.666652113199234e-1f;
    p = p * r + 4.999999403953552e-1f;
    p = (p * r) * r + r + 1.0f;
#if defined(__AVX512F__)
    return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // 2^n in two factors: n reaches -159, where the result is subnormal or 0.
    const VectorInt exponent = (VectorInt)((VectorBits)shifted - 0x4b400000u);
    const VectorInt first = exponent >> 1;
    const VectorInt second = exponent - first;
    return p * (Vector)((VectorBits)(first + 127) << 23) * (Vector)((VectorBits)(second + 127) << 23);
#endif
  }

  static SUBNET_INLINE Vector reciprocal(Vector d) {
#if defined(__AVX512F__)
    // 14 bits, then one Newton step: within 1 ulp, at a third of the division's time.
    const Vector estimate = (Vector)_mm512_rcp14_ps((__m512)d);
    return estimate + estimate * (1.0f - d * estimate);
#else
    return 1.0f / d;
#endif
  }
};

using VectorMask = Mask<VectorMath>;

// How each dtype is stored. Stores round to nearest even; a NaN stays a NaN.
struct Float32 {
  using Stored = float;
  static SUBNET_INLINE Vector load(const float* from) { return load_as<Vector>(from); }
  static SUBNET_INLINE void store(float* to, Vector value) { store_as(to, value); }
};

struct BFloat16 {
  using Stored = uint16_t;
  static SUBNET_INLINE Vector load(const uint16_t* from) {
    return (Vector)(__builtin_convertvector(load_as<VectorHalf>(from), VectorBits) << 16);
  }
  static SUBNET_INLINE void store(uint16_t* to, Vector value) {
    const VectorBits bits = (VectorBits)value;
    const VectorBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const VectorBits quiet = (bits >> 16) | 0x40u;
    const VectorBits result = value == value ? rounded : quiet;
    store_as(to, __builtin_convertvector(result, VectorHalf));
  }
};

#if !defined(__AVX2__)
SUBNET_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  float value;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {
    value = (float)magnitude * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
    __builtin_memcpy(&bits, &value, 4);
  }
  bits |= sign;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

SUBNET_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude >= 0x38800000u) {
    return sign | (uint16_t)((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
  }
  float small;  // below 2^-14: adding 0.5 leaves the value in units of 2^-24, rounded to nearest even
  __builtin_memcpy(&small, &magnitude, 4);
  small += 0.5f;
  uint32_t units;
  __builtin_memcpy(&units, &small, 4);
  return sign | (uint16_t)(units - 0x3f000000u);
}
#endif

struct Float16 {
  using Stored = uint16_t;
#if defined(__AVX512F__)
  static SUBNET_INLINE Vector load(const uint16_t* from) {
    return (Vector)_mm512_cvtph_ps(load_as<__m256i>(from));
  }
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
    Vector value;
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = half_to_float(from[lane]);
    return value;
  }
  static SUBNET_INLINE void store(uint16_t* to, Vector value) {
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = float_to_half(value[lane]);
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
