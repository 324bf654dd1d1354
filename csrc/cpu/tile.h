// A block of a matrix product held in registers, and the packing that feeds it.
//
//   out[r*out_row + c] = sum over i of a[r*a_row + i*a_step] * b[i*width + c],  r < kTileRows, c < width = V * kLanes
//
// b is packed: `width` values of step i lie side by side. Nothing of this is meant to beat a BLAS on a large product; it
// is here so that a mask can be applied to a weight, or a slope to its gradient, while both are in the cache.
#pragma once

#include "simd.h"

namespace subnet {
namespace SUBNET_CAPABILITY {

// kTileRows * kTileVectors accumulators and kTileVectors + 1 operands fill 32 (AVX-512) or 16 registers.
constexpr int kTileRows = kLinearRows;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int64_t kTileWidth = kTileVectors * kLanes;

// The sum over i is made in parts of this length, so that its rounding error does not grow with the whole length.
constexpr int64_t kTileSteps = 512;

// Adds to `out` if `adds`. Not inlined: the caller's constants would push the accumulators out of the registers.
template <int R, int V>
__attribute__((noinline)) void product_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t count,
                                            float* out, int64_t out_row, bool adds) {
  Vector sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = Vector{};
  }
  for (int64_t i = 0; i < count; ++i, a += a_step, b += V * kLanes) {
    Vector columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = load_as<Vector>(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector value = a[r * a_row] - Vector{};  // a broadcast without an addition
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += value * columns[v];
    }
  }
  if (adds) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += load_as<Vector>(out + r * out_row + v * kLanes);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store_as(out + r * out_row + v * kLanes, sum[r][v]);
  }
}

template <int V>
SUBNET_INLINE void product_tile_of(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b,
                                   int64_t count, float* out, int64_t out_row, bool adds) {
  switch (rows) {
    case 1: return product_tile<1, V>(a, a_row, a_step, b, count, out, out_row, adds);
    case 2: return product_tile<2, V>(a, a_row, a_step, b, count, out, out_row, adds);
    case 3: return product_tile<3, V>(a, a_row, a_step, b, count, out, out_row, adds);
    case 4: return product_tile<4, V>(a, a_row, a_step, b, count, out, out_row, adds);
    case 5: return product_tile<5, V>(a, a_row, a_step, b, count, out, out_row, adds);
    default: return product_tile<kTileRows, V>(a, a_row, a_step, b, count, out, out_row, adds);
  }
}

// rows <= kTileRows, width a multiple of kLanes, width <= kTileWidth.
inline void product_tile(int64_t rows, int64_t width, const float* a, int64_t a_row, int64_t a_step, const float* b,
                         int64_t count, float* out, int64_t out_row) {
  for (int64_t i = 0; i < count; i += kTileSteps, a += kTileSteps * a_step, b += kTileSteps * width) {
    const int64_t steps = count - i < kTileSteps ? count - i : kTileSteps;
    const bool adds = i > 0;
    switch (width / kLanes) {
      case 1: product_tile_of<1>(rows, a, a_row, a_step, b, steps, out, out_row, adds); break;
      case 2: product_tile_of<2>(rows, a, a_row, a_step, b, steps, out, out_row, adds); break;
#if defined(__AVX512F__)
      case 3: product_tile_of<3>(rows, a, a_row, a_step, b, steps, out, out_row, adds); break;
      default: product_tile_of<4>(rows, a, a_row, a_step, b, steps, out, out_row, adds); break;
#endif
    }
  }
}

// The tiles of a packed matrix of `columns` columns and `count` steps follow each other; the last may be narrower.
struct Tiles {
  int64_t columns, count;

  int64_t number() const { return (columns + kTileWidth - 1) / kTileWidth; }
  int64_t begin(int64_t tile) const { return tile * kTileWidth; }
  int64_t used(int64_t tile) const {  // columns of this tile that exist
    const int64_t left = columns - begin(tile);
    return left < kTileWidth ? left : kTileWidth;
  }
  int64_t width(int64_t tile) const { return (used(tile) + kLanes - 1) / kLanes * kLanes; }
  const float* at(const float* packed, int64_t tile) const { return packed + begin(tile) * count; }

  // packed[tile][i][c] = from[i*step_stride + (begin(tile)+c)*column_stride], 0 beyond the last column, for the steps
  // [step_begin, step_end)
  void pack(const float* from, int64_t step_stride, int64_t column_stride, float* packed, int64_t step_begin,
            int64_t step_end) const {
    for (int64_t tile = 0; tile < number(); ++tile) {
      const int64_t num = used(tile), wide = width(tile);
      const float* source = from + begin(tile) * column_stride;
      float* to = packed + begin(tile) * count + step_begin * wide;
      for (int64_t i = step_begin; i < step_end; ++i, to += wide) {
        for (int64_t c = 0; c < num; ++c) to[c] = source[i * step_stride + c * column_stride];
        for (int64_t c = num; c < wide; ++c) to[c] = 0.0f;
      }
    }
  }
};

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
