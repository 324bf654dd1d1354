// A linear layer's two passes over memory of weight's size, fused with their products, for few rows of x (fp32).
//
// Forward: a group of rows of w_eff is made and multiplied while it lies in the first-level cache. Backward: a tile of
// grad_out.T @ x becomes the score gradient before it leaves the cache, so the weight's gradient is never stored.
// With few rows of x the memory traffic counts as much as the arithmetic; with many, a BLAS is faster and is used.
#include "kernels.h"
#include "scale_by_mask.h"
#include "tile.h"

namespace subnet {
namespace SUBNET_CAPABILITY {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The lines of a tile of [rows, width] floats are asked for, to be read when the next product is done.
SUBNET_INLINE void fetch(const float* from, int64_t row_stride, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(from + r * row_stride + c);
  }
}

// out[j*n + first + i] = buffer[tile of j][i][j] + bias[first + i]
void write_out(const MaskedLinear& p, const Tiles& tiles, int64_t first, int64_t rows, const float* buffer) {
  for (int64_t tile = 0; tile < tiles.number(); ++tile) {
    const int64_t width = tiles.width(tile);
    const float* from = buffer + tiles.begin(tile) * kLinearBlock;
    for (int64_t j = 0; j < tiles.used(tile); ++j) {
      float* to = p.out + (tiles.begin(tile) + j) * p.n + first;
      for (int64_t i = 0; i < rows; ++i) to[i] = from[i * width + j] + (p.bias == nullptr ? 0.0f : p.bias[first + i]);
    }
  }
}

// grads[group][j][r] = grad_out[j, first + group*kLinearRows + r], read along the rows of grad_out
void pack_grads(const LinearGradScores& p, int64_t first, float* grads) {
  const int64_t count = smaller(kLinearBlock, p.n - first);
  for (int64_t j = 0; j < p.m; ++j) {
    const float* from = p.grad_out + j * p.n + first;
    float* to = grads + j * kLinearRows;
    for (int64_t i = 0; i < count; i += kLinearRows, to += p.m * kLinearRows) {
      for (int64_t r = 0; r < smaller(kLinearRows, count - i); ++r) to[r] = from[i + r];
    }
  }
}

}  // namespace

void masked_linear_pack(const MaskedLinear& p, int64_t begin, int64_t end) {
  Tiles{p.m, p.k}.pack(p.x, 1, p.k, p.packed, begin, end);
}

void masked_linear(const MaskedLinear& p, int64_t block_begin, int64_t block_end) {
  const Tiles tiles{p.m, p.k};
  alignas(64) float buffer[kLinearBlock * (kLinearMostRows + 16)];
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t first = block * kLinearBlock, last = smaller(first + kLinearBlock, p.n);
    double sum = 0;
    for (int64_t row = first; row < last; row += kLinearRows) {
      const int64_t rows = smaller(kLinearRows, last - row), at = row * p.k;
      if (p.scores != nullptr) {
        sum += scale_by_mask<Kind::sigmoid, Float32, Float32>(p.weight + at, p.scores + at, p.beta, p.w_eff + at,
                                                              rows * p.k);
      }
      for (int64_t tile = 0; tile < tiles.number(); ++tile) {
        const int64_t width = tiles.width(tile);
        float* to = buffer + tiles.begin(tile) * kLinearBlock + (row - first) * width;
        product_tile(rows, width, p.w_eff + at, p.k, 1, tiles.at(p.packed, tile), p.k, to);
      }
    }
    if (p.partials != nullptr) p.partials[block] = sum;
    write_out(p, tiles, first, last - first, buffer);
  }
}

void linear_grad_scores_pack(const LinearGradScores& p, int64_t begin, int64_t end) {
  Tiles{p.k, p.m}.pack(p.x, p.k, 1, p.packed, begin, end);
}

void linear_grad_scores(const LinearGradScores& p, int64_t block_begin, int64_t block_end) {
  const Tiles tiles{p.k, p.m};
  const Vector beta = broadcast(p.beta);
  const Vector grad_penalty = broadcast(p.grad_penalty);
  float grads[kLinearBlock * kLinearMostRows];  // of one block, [group of rows][m][row]
  alignas(64) float product[kLinearRows * kTileWidth];
  for (int64_t row = block_begin * kLinearBlock; row < smaller(block_end * kLinearBlock, p.n); row += kLinearRows) {
    const int64_t in_block = row % kLinearBlock, rows = smaller(kLinearRows, p.n - row);
    if (in_block == 0) pack_grads(p, row, grads);
    const float* group = grads + in_block * p.m;
    for (int64_t tile = 0; tile < tiles.number(); ++tile) {
      const int64_t width = tiles.width(tile), used = tiles.used(tile), at = row * p.k + tiles.begin(tile);
      fetch(p.weight + at, p.k, rows, used);
      fetch(p.scores + at, p.k, rows, used);
      product_tile(rows, width, group, 1, kLinearRows, tiles.at(p.packed, tile), p.m, product);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < used; c += kLanes) {
          const int64_t i = at + r * p.k + c, left = smaller(kLanes, used - c);
          const Vector slope = VectorMask::slope<Kind::sigmoid>(load_some<Float32>(p.scores + i, left), beta);
          const Vector total = load_as<Vector>(product + r * width + c) * load_some<Float32>(p.weight + i, left);
          store_some<Float32>(p.grad_scores + i, (total + grad_penalty) * slope, left);
        }
      }
    }
  }
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
