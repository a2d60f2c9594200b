// float32 products in TF32. torch's own can run in TF32 only by a flag of the whole process, which
// belongs to the user's own products: see docs/adr/0004-tf32.md.
#include <algorithm>

#include "device.cuh"
#include "kernels.h"

namespace lstmx::cuda {
namespace {

// A block computes a tile of c, 64 x 64, by 4 warps of 32 x 32; k goes by 32, two stages deep.
constexpr int kTile = 64, kDepth = 32, kThreads = 128, kStages = 2;
// Padding of a shared row that spreads a fragment's elements over the banks.
constexpr int kAcross = kTile + 8, kAlong = kDepth + 4;
constexpr int kTileFloats = std::max(kAcross * kDepth, kAlong* kTile);

// A 64 x 32 piece of an operand in shared memory; its rows are what stride 1 runs along in global
// memory: k (kAlongK), or m or n.
template <bool kAlongK>
struct Piece {
  static constexpr int kRow = kAlongK ? kAlong : kAcross;
  static constexpr int kRows = kAlongK ? kTile : kDepth, kColumns = kAlongK ? kDepth : kTile;

  // outer: index along m or n, of `outer_count`; elements outside are zero.
  LSTMX_DEVICE static void fetch(float* shared, const float* global, int64_t stride, int64_t outer,
                                 int64_t outer_count, int64_t k, int64_t k_count) {
    const int64_t row0 = kAlongK ? outer : k, rows = kAlongK ? outer_count : k_count;
    const int64_t column0 = kAlongK ? k : outer, columns = kAlongK ? k_count : outer_count;
    constexpr int kWords = kColumns / 4;
    LSTMX_UNROLL for (int i = 0; i < kRows * kWords / kThreads; ++i) {
      const int word = i * kThreads + static_cast<int>(thread_index());
      const int row = word / kWords, column = word % kWords * 4;
      const bool valid = row0 + row < rows && column0 + column < columns;
      const float* from = valid ? global + (row0 + row) * stride + column0 + column : global;
      cp_async16(shared + row * kRow + column, from, valid);
    }
  }

  LSTMX_DEVICE static uint32_t element(const float* shared, int outer, int k) {
    return to_tf32(shared[kAlongK ? outer * kRow + k : k * kRow + outer]);
  }
};

template <bool kAAlongK, bool kBAlongK>
LSTMX_KERNEL(kThreads)
tf32_kernel(Tf32ProductParams p) {
  using A = Piece<kAAlongK>;
  using B = Piece<kBAlongK>;
  float* shared = shared_memory<float>();
  const auto a_stage = [&](int64_t i) { return shared + i % kStages * 2 * kTileFloats; };
  const auto b_stage = [&](int64_t i) { return a_stage(i) + kTileFloats; };
  const int64_t m0 = int64_t{block_y()} * kTile, n0 = int64_t{block_x()} * kTile;
  const int64_t pieces = (p.k + kDepth - 1) / kDepth;
  const auto fetch = [&](int64_t i) {
    if (i < pieces) {
      A::fetch(a_stage(i), p.a, kAAlongK ? p.a_row : p.a_column, m0, p.m, i * kDepth, p.k);
      B::fetch(b_stage(i), p.b, kBAlongK ? p.b_column : p.b_row, n0, p.n, i * kDepth, p.k);
    }
    cp_async_commit();
  };

  const int warp = static_cast<int>(warp_index()), lane = static_cast<int>(lane_index());
  const int warp_m = warp / 2 * 32, warp_n = warp % 2 * 32, g = lane / 4, q = lane % 4;
  float sums[2][4][4] = {};
  fetch(0);
  for (int64_t i = 0; i < pieces; ++i) {
    fetch(i + 1);
    cp_async_wait<1>();
    sync_block();
    const float *a_piece = a_stage(i), *b_piece = b_stage(i);
    LSTMX_UNROLL for (int k = 0; k < kDepth; k += 8) {
      uint32_t a[2][4], b[4][2];
      LSTMX_UNROLL for (int r = 0; r < 2; ++r) {
        LSTMX_UNROLL for (int e = 0; e < 4; ++e) {
          a[r][e] = A::element(a_piece, warp_m + 16 * r + g + 8 * (e % 2), k + q + 4 * (e / 2));
        }
      }
      LSTMX_UNROLL for (int c = 0; c < 4; ++c) {
        LSTMX_UNROLL for (int e = 0; e < 2; ++e) {
          b[c][e] = B::element(b_piece, warp_n + 8 * c + g, k + q + 4 * e);
        }
      }
      LSTMX_UNROLL for (int r = 0; r < 2; ++r) {
        LSTMX_UNROLL for (int c = 0; c < 4; ++c) mma_tf32(sums[r][c], a[r], b[c]);
      }
    }
    sync_block();  // the next fetch overwrites this stage
  }
  cp_async_wait<0>();
  LSTMX_UNROLL for (int r = 0; r < 2; ++r) {
    LSTMX_UNROLL for (int c = 0; c < 4; ++c) {
      LSTMX_UNROLL for (int e = 0; e < 4; ++e) {
        const int64_t row = m0 + warp_m + 16 * r + g + 8 * (e / 2);
        const int64_t column = n0 + warp_n + 8 * c + 2 * q + e % 2;
        if (row < p.m && column < p.n) p.c[row * p.c_row + column] = sums[r][c][e];
      }
    }
  }
}

}  // namespace

cudaError_t tf32_product(const Tf32ProductParams& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  const auto tiles = [](int64_t count) {
    return static_cast<unsigned>((count + kTile - 1) / kTile);
  };
  const LaunchSize size = {tiles(p.n), tiles(p.m), kThreads,
                           sizeof(float) * kStages * 2 * kTileFloats};
  const bool a_along_k = p.a_column == 1, b_along_k = p.b_row == 1;
  auto* kernel = a_along_k ? (b_along_k ? tf32_kernel<true, true> : tf32_kernel<true, false>)
                           : (b_along_k ? tf32_kernel<false, true> : tf32_kernel<false, false>);
  return launch(kernel, size, stream, p);
}

}  // namespace lstmx::cuda
