// out[m, n] = x[m, k] (weight * m(beta*scores))[n, k]^T + bias and the sum of the mask, for few rows of x.
//
//   masked_linear_kernel   grid: blocks of 16*kRowWarps rows of weight, times tiles of kColumns rows of x. Of eight warps
//                          kRowWarps lie along the rows of weight; the others share k, step by step of 32, and are
//                          added up in their order through shared memory. Reads weight (2 B) and scores (4 B) once per
//                          tile of rows of x, and x from the caches.
//   masked_linear_sum_kernel   one block: adds up the mask's sums of the blocks of rows.
//
// It is computed transposed, so that the masked weight is the left operand of mma.sync (m16n8k16): made in registers,
// from what a thread loads by 16 bytes, and never stored. The sum over k may be taken in any order, so the eight
// neighbours in k that a thread loads are given to two instructions as the columns that their fragments have there, in
// both operands: nothing is shuffled. The next step's weight and scores are on their way while one is multiplied. fp32
// accumulation; m is exact and summed in fp32 over groups of 8, in double beyond, in an order that depends on sizes only.
// Idea of fragments loaded as they lie: the weights of Marlin (Frantar et al. 2024), which are reordered beforehand.
#include "common.cuh"

namespace subnet {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kStep = 32;  // of k: four threads of eight each

// d += a b over the fragments of a warp: a [16, 16] and b [16, 8] of 16 bits, d fp32. PTX ISA, mma.m16n8k16.
template <Dtype dtype>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(SUBNET_CUDA_ON_HOST)
  cuda_mma_m16n8k16(d, a, b0, b1, dtype == Dtype::bfloat16);
#else
#define SUBNET_MMA(type)                                                                             \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                        \
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                               \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (dtype == Dtype::bfloat16) {
    SUBNET_MMA("bf16");
  } else {
    SUBNET_MMA("f16");
  }
#undef SUBNET_MMA
#endif
}

// A thread's part of a chunk: eight neighbours of two rows.
struct Strip {
  Raw<kVector> weight[2], scores[2];
};

template <Dtype dtype>
__device__ __forceinline__ Strip load_strip(const CudaMaskedLinear& p, const int64_t (&row)[2], int at) {
  Strip strip{};
  if (at < p.k) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      strip.weight[r] = load_raw<kVector>(p.weight, dtype, row[r] + at);
      strip.scores[r] = load_raw<kVector>(p.scores, Dtype::float32, row[r] + at);
    }
  }
  return strip;
}

template <Dtype dtype, int kColumns, int kRowWarps>
__global__ void __launch_bounds__(kThreads) masked_linear_kernel(const __grid_constant__ CudaMaskedLinear p) {
  constexpr int kRows = 16 * kRowWarps, kSlices = kWarps / kRowWarps, kTiles = kColumns / 8;
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  const int slice = warp / kRowWarps;
  const int row_block = blockIdx.x / p.column_tiles, first_column = blockIdx.x % p.column_tiles * kColumns;
  const int first_row = row_block * kRows + warp % kRowWarps * 16 + group;  // and the one eight below
  const float beta = *p.beta;
  int64_t row[2];  // where they begin; beyond the last row the last one stands in, and is not kept
  bool counts[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int n = first_row + 8 * r;
    row[r] = (int64_t)(n < p.n ? n : p.n - 1) * p.k;
    counts[r] = n < p.n && first_column == 0;
  }
  float acc[kTiles][4] = {};
  double sum = 0;
  const int steps = (p.k + kStep * kSlices - 1) / (kStep * kSlices);
  int at = slice * kStep + quad * kVector;
  Strip strip = load_strip<dtype>(p, row, at);
  for (int step = 0; step < steps; ++step, at += kSlices * kStep) {
    const Strip next = load_strip<dtype>(p, row, at + kSlices * kStep);
    Raw<kVector> masked[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float w[kVector], s[kVector], mask[kVector];
      to_floats(strip.weight[r], dtype, w);
      to_floats(strip.scores[r], Dtype::float32, s);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        mask[i] = ScalarMask::value<Kind::sigmoid>(s[i], beta);
        w[i] *= mask[i];
      }
      masked[r] = to_raw(w, dtype);
      if (counts[r] && at < p.k) sum += sum_of(mask);
    }
    const uint32_t low[4] = {masked[0].word[0], masked[1].word[0], masked[0].word[1], masked[1].word[1]};
    const uint32_t high[4] = {masked[0].word[2], masked[1].word[2], masked[0].word[3], masked[1].word[3]};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int column = first_column + 8 * tile + group;
      Raw<kVector> x{};
      if (column < p.m && at < p.k) x = load_raw<kVector>(p.x, dtype, (int64_t)column * p.k + at);
      multiply_add<dtype>(acc[tile], low, x.word[0], x.word[1]);
      multiply_add<dtype>(acc[tile], high, x.word[2], x.word[3]);
    }
    strip = next;
  }

  __shared__ float total[kRows][kColumns + 1];
  const int own_row = warp % kRowWarps * 16 + group;
  for (int turn = 0; turn < kSlices; ++turn) {
    if (slice == turn) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& to = total[own_row + i / 2 * 8][8 * tile + 2 * quad + i % 2];
          to = turn == 0 ? acc[tile][i] : to + acc[tile][i];
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
    const int n = row_block * kRows + i % kRows, column = first_column + i / kRows;
    if (n >= p.n || column >= p.m) continue;
    float value[1] = {total[i % kRows][i / kRows]};
    if (p.bias != nullptr) {
      float bias[1];
      load(p.bias, dtype, n, bias);
      value[0] += bias[0];
    }
    store(p.out, dtype, (int64_t)column * p.n + n, value);
  }
  if (first_column == 0) {
    sum = block_sum(sum);
    if (threadIdx.x == 0) p.partials[row_block] = sum;
  }
}

// The sum of all partials.
__global__ void __launch_bounds__(kThreads) masked_linear_sum_kernel(const __grid_constant__ CudaMaskedLinear p) {
  double sum = 0;
  for (int i = threadIdx.x; i < p.row_blocks; i += kThreads) sum += p.partials[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *p.penalty = (float)sum;
}

constexpr int kFewestBlocks = 128;  // about the processors of the GPUs that this is for

int columns_of(int64_t m) { return m <= 16 ? 16 : m <= 64 ? 64 : 128; }
int64_t tiles_of(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

// Four warps along the rows of weight read x less often; where that leaves too few blocks, one.
int row_warps_of(int64_t m, int64_t n) {
  return tiles_of(n, 64) * tiles_of(m, columns_of(m)) >= kFewestBlocks ? 4 : 1;
}

template <Dtype dtype, int kColumns>
auto kernel_of(int row_warps) {
  return row_warps == 4 ? masked_linear_kernel<dtype, kColumns, 4> : masked_linear_kernel<dtype, kColumns, 1>;
}

template <Dtype dtype>
auto kernel_of(int columns, int row_warps) {
  return columns == 16   ? kernel_of<dtype, 16>(row_warps)
         : columns == 64 ? kernel_of<dtype, 64>(row_warps)
                         : kernel_of<dtype, 128>(row_warps);
}

}  // namespace

int64_t masked_linear_blocks(int64_t m, int64_t n) { return tiles_of(n, 16 * row_warps_of(m, n)); }

const char* launch_masked_linear(const CudaMaskedLinear& params, int device, void* stream) {
  return launch_on(device, [&] {
    CudaMaskedLinear p = params;
    const int columns = columns_of(p.m), row_warps = row_warps_of(p.m, p.n);
    p.row_blocks = (int)masked_linear_blocks(p.m, p.n), p.column_tiles = (int)tiles_of(p.m, columns);
    enqueue(p.dtype == Dtype::bfloat16 ? kernel_of<Dtype::bfloat16>(columns, row_warps)
                                       : kernel_of<Dtype::float16>(columns, row_warps),
            (int64_t)p.row_blocks * p.column_tiles, p, stream);
    enqueue(masked_linear_sum_kernel, 1, p, stream);
  });
}

}  // namespace subnet
