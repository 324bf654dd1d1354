// A linear layer's two passes over memory of weight's size, fused with their products, for few rows of x (fp32).
//
// Forward: a group of rows of w_eff is made and multiplied while it lies in the first-level cache. Backward: a tile of
// grad_out.T @ x becomes the score gradient before it leaves the cache, so the weight's gradient is never stored; or it
// is stepped with (mask_adamw.cpp), and no gradient of weight's size is stored at all.
// With few rows of x the memory traffic counts as much as the arithmetic; with many, a BLAS is faster and is used.
#include "kernels.h"
#include "mask_adamw.h"
#include "scale_by_mask.h"
#include "score_gradient.h"
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
        product_tile(rows, width, p.w_eff + at, p.k, 1, tiles.at(p.packed, tile), p.k, to, width);
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
      product_tile(rows, width, group, 1, kLinearRows, tiles.at(p.packed, tile), p.m, product, width);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = at + r * p.k;
        score_gradients<Float32, Float32>(product + r * width, p.weight + i, p.scores + i, p.beta, p.grad_penalty,
                                          p.grad_scores + i, used);
      }
    }
  }
}

void linear_step(const LinearGradScores& p, const MaskAdamW& step, int64_t block_begin, int64_t block_end) {
  const Tiles tiles{p.k, p.m};
  float grads[kLinearBlock * kLinearMostRows];  // as above
  float* products = new float[kLinearRows * p.k];
  alignas(64) float rest[kLinearRows * kTileWidth];
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t first = block * kLinearBlock, last = smaller(first + kLinearBlock, p.n);
    pack_grads(p, first, grads);
    Sum sum;
    for (int64_t row = first; row < last; row += kLinearRows) {
      const int64_t rows = smaller(kLinearRows, last - row);
      for (int64_t tile = 0; tile < tiles.number(); ++tile) {
        const int64_t width = tiles.width(tile), used = tiles.used(tile);
        float* to = products + tiles.begin(tile);
        const float* group = grads + (row - first) * p.m;
        if (used == width) {
          product_tile(rows, width, group, 1, kLinearRows, tiles.at(p.packed, tile), p.m, to, p.k);
          continue;
        }
        product_tile(rows, width, group, 1, kLinearRows, tiles.at(p.packed, tile), p.m, rest, width);
        for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(to + r * p.k, rest + r * width, used * sizeof(float));
      }
      for (int64_t at = 0; at < rows * p.k; at += kStepRun) {  // longer runs than a tile's: 1.1 times as fast
        mask_adamw_run(step, products + at, row * p.k + at, smaller(kStepRun, rows * p.k - at), sum);
      }
    }
    if (step.w_eff != nullptr) step.partials[block] = sum.total();
  }
  delete[] products;
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
