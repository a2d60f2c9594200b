// The kernels of the stepwise path, generic over cell and storage type: per step one product by
// ATen and one of these; per sequence the weights' preparation and the sum for the biases.
#pragma once

#include <algorithm>

#include "../philox.h"
#include "device.cuh"
#include "kernels.h"

namespace lstmx::cuda {

template <class T>
LSTMX_DEVICE T& ref(void* p, int64_t index) {
  return static_cast<T*>(p)[index];
}
template <class T>
LSTMX_DEVICE const T& ref(const void* p, int64_t index) {
  return static_cast<const T*>(p)[index];
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- A step ------------------------------------------------------------------------------------

// A thread for each unit; the blocks of a column share out the rows.
inline constexpr int kStepThreads = 128;
inline LaunchSize step_size(int64_t rows, int64_t units) {
  constexpr int64_t kMaxGridY = 65535;
  return {static_cast<unsigned>(divide_up(units, kStepThreads)),
          static_cast<unsigned>(std::min(rows, kMaxGridY)), kStepThreads};
}
LSTMX_DEVICE int64_t step_unit() { return int64_t{block_x()} * kStepThreads + thread_index(); }

template <class Cell, class Storage>
LSTMX_KERNEL(kStepThreads)
forward_step_kernel(ForwardStepParams p) {
  using V = ComputeOf<Storage>;
  constexpr int G = Cell::kGates;
  const int64_t H = p.hidden, Hp = padded(H), unit = step_unit();
  if (unit >= H) return;
  V b_ih[G], b_hh[G];
  LSTMX_UNROLL for (int g = 0; g < G; ++g) {
    b_ih[g] = p.b_ih ? V(widen(ref<Storage>(p.b_ih, g * H + unit))) : V(0);
    b_hh[g] = p.b_hh ? V(widen(ref<Storage>(p.b_hh, g * H + unit))) : V(0);
  }
  for (int64_t row = block_y(); row < p.rows; row += grid_y()) {
    V x[G], h[G], prev[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved];
    LSTMX_UNROLL for (int g = 0; g < G; ++g) {
      const int64_t gate = (row * G + g) * Hp + unit;
      x[g] = ref<V>(p.x_gates, gate) + b_ih[g];
      h[g] = ref<V>(p.h_gates, gate) + b_hh[g];
    }
    const int64_t inner = row * H + unit;
    prev[0] = widen(ref<Storage>(p.h, row * Hp + unit));
    LSTMX_UNROLL for (int k = 1; k < Cell::kStates; ++k) prev[k] = ref<V>(p.carried[k], inner);
    Cell::forward(x, h, prev, next, saved);

    if (p.next_h) narrow(next[0], ref<Storage>(p.next_h, row * Hp + unit));
    LSTMX_UNROLL for (int k = 1; k < Cell::kStates; ++k) ref<V>(p.carried[k], inner) = next[k];
    LSTMX_UNROLL for (int k = 0; k < Cell::kStates; ++k) {
      if (p.states[k]) narrow(next[k], ref<Storage>(p.states[k], inner));
    }
    if (p.saved) {
      LSTMX_UNROLL for (int s = 0; s < Cell::kSaved; ++s) {
        narrow(saved[s], ref<Storage>(p.saved, (row * Cell::kSaved + s) * H + unit));
      }
    }
  }
}

template <class Cell, class Storage>
LSTMX_KERNEL(kStepThreads)
backward_step_kernel(BackwardStepParams p) {
  using V = ComputeOf<Storage>;
  constexpr int kStates = Cell::kStates, kGrads = Cell::kGrads, kSaved = Cell::kSaved;
  const int64_t H = p.hidden, Hp = padded(H), unit = step_unit();
  if (unit >= Hp) return;
  const int64_t all = p.rows > p.product_rows ? p.rows : p.product_rows;
  for (int64_t row = block_y(); row < all; row += grid_y()) {
    V dgates[kGrads] = {};  // zero in the padding
    if (unit < H) {
      const int64_t inner = row * H + unit;
      V dnext[kStates];
      LSTMX_UNROLL for (int k = 0; k < kStates; ++k) dnext[k] = ref<V>(p.carry[k], inner);
      if (row < p.product_rows) dnext[0] += ref<V>(p.product, row * Hp + unit);
      if (row >= p.rows) {
        ref<V>(p.carry[0], inner) = dnext[0];
        continue;
      }
      V prev[kStates], next[kStates], saved[kSaved], dprev[kStates];
      LSTMX_UNROLL for (int k = 0; k < kStates; ++k) {
        const void* from = row < p.previous_rows ? p.previous[k] : p.initial[k];
        prev[k] = widen(ref<Storage>(from, inner));
        next[k] = widen(ref<Storage>(p.states[k], inner));
        if (p.dstates[k]) dnext[k] += V(widen(ref<Storage>(p.dstates[k], inner)));
      }
      LSTMX_UNROLL for (int s = 0; s < kSaved; ++s) {
        saved[s] = widen(ref<Storage>(p.saved, (row * kSaved + s) * H + unit));
      }
      Cell::backward(saved, prev, next, dnext, dgates, dprev);
      LSTMX_UNROLL for (int k = 0; k < kStates; ++k) ref<V>(p.carry[k], inner) = dprev[k];
    }
    if (row >= p.rows) continue;
    LSTMX_UNROLL for (int g = 0; g < kGrads; ++g) {
      narrow(dgates[g], ref<Storage>(p.dgates, (row * kGrads + g) * Hp + unit));
    }
  }
}

template <class Cell, class Storage>
cudaError_t forward_step(const ForwardStepParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return launch(forward_step_kernel<Cell, Storage>, step_size(p.rows, p.hidden), stream, p);
}

template <class Cell, class Storage>
cudaError_t backward_step(const BackwardStepParams& p, cudaStream_t stream) {
  const int64_t all = std::max(p.rows, p.product_rows);
  if (all == 0) return cudaSuccess;
  return launch(backward_step_kernel<Cell, Storage>, step_size(all, padded(p.hidden)), stream, p);
}

// ---- Weights -----------------------------------------------------------------------------------

// Elements are handled four at a time, as one Philox block covers them.
inline constexpr int kQuad = 4, kWeightThreads = 256;
inline LaunchSize weight_size(int64_t elements) {
  constexpr int64_t kEnoughBlocks = 4096;
  const int64_t blocks = divide_up(divide_up(elements, kQuad), kWeightThreads);
  return {static_cast<unsigned>(std::min(blocks, kEnoughBlocks)), 1, kWeightThreads};
}

// Calls body(element, factor) for each of `count` elements of a matrix, counted row by row.
template <class V, class Body>
LSTMX_DEVICE void for_each_element(int64_t count, const WeightDropout& dropout, Body body) {
  const bool masked = dropout.seed != nullptr;
  const MaskRule rule = masked ? MaskRule::make(*dropout.seed, dropout.p) : MaskRule{};
  const int64_t stride = int64_t{grid_x()} * kWeightThreads;
  for (int64_t quad = int64_t{block_x()} * kWeightThreads + thread_index(); quad * kQuad < count;
       quad += stride) {
    auto block = philox_counter(static_cast<uint64_t>(quad));
    if (masked) philox4x32_10(block, rule.seed);
    LSTMX_UNROLL for (int i = 0; i < kQuad; ++i) {
      const int64_t element = quad * kQuad + i;
      if (element >= count) break;
      const bool kept = !masked || rule.keeps(block.word[i]);
      body(element, kept ? V(rule.scale) : V(0));
    }
  }
}

// Where element e of [G, H, K] lies in [G, Hp, Kp].
LSTMX_DEVICE int64_t padded_place(const WeightParams& p, int64_t element) {
  const int64_t row = element / p.columns, gate = row / p.hidden;
  const int64_t place = (gate + p.rotation) % p.gates;
  return (place * padded(p.hidden) + row % p.hidden) * padded(p.columns) + element % p.columns;
}

template <class Storage>
LSTMX_KERNEL(kWeightThreads)
prepare_kernel(WeightParams p) {
  using V = ComputeOf<Storage>;
  for_each_element<V>(p.gates * p.hidden * p.columns, p.dropout, [&](int64_t element, V factor) {
    const V weight = widen(ref<Storage>(p.from, element));
    narrow(weight * factor, ref<Storage>(p.to, padded_place(p, element)));
  });
}

template <class Storage>
LSTMX_KERNEL(kWeightThreads)
finish_kernel(WeightParams p) {
  using V = ComputeOf<Storage>;
  for_each_element<V>(p.gates * p.hidden * p.columns, p.dropout, [&](int64_t element, V factor) {
    narrow(ref<V>(p.from, padded_place(p, element)) * factor, ref<Storage>(p.to, element));
  });
}

template <class V>
LSTMX_KERNEL(kWeightThreads)
mask_kernel(MaskParams p) {
  for_each_element<V>(p.count, p.dropout,
                      [&](int64_t element, V factor) { ref<V>(p.out, element) = factor; });
}

template <class Storage>
cudaError_t prepare(const WeightParams& p, cudaStream_t stream) {
  const int64_t count = p.gates * p.hidden * p.columns;
  if (count == 0) return cudaSuccess;
  return launch(prepare_kernel<Storage>, weight_size(count), stream, p);
}
template <class Storage>
cudaError_t finish(const WeightParams& p, cudaStream_t stream) {
  const int64_t count = p.gates * p.hidden * p.columns;
  if (count == 0) return cudaSuccess;
  return launch(finish_kernel<Storage>, weight_size(count), stream, p);
}
template <class Storage>
cudaError_t mask(const MaskParams& p, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  return launch(mask_kernel<ComputeOf<Storage>>, weight_size(p.count), stream, p);
}

// ---- Sums of columns
// -----------------------------------------------------------------------------

inline constexpr int kSumWarps = 8, kSumThreads = 32 * kSumWarps;

struct SumParams {
  int64_t rows, columns, rows_per_block;
  const void* in;
  void* out;  // [grid_y, columns]
};

// A lane for each column; the warps of a block, then the blocks of a column, share out the rows.
template <class In, class V>
LSTMX_KERNEL(kSumThreads)
sum_rows_kernel(SumParams p) {
  V* sums = shared_memory<V>();  // [kSumWarps, 32]
  const int64_t column = int64_t{block_x()} * 32 + lane_index();
  const int64_t begin = block_y() * p.rows_per_block;
  const int64_t end = begin + p.rows_per_block < p.rows ? begin + p.rows_per_block : p.rows;
  V sum = 0;
  if (column < p.columns) {
    for (int64_t row = begin + warp_index(); row < end; row += kSumWarps) {
      sum += V(widen(ref<In>(p.in, row * p.columns + column)));
    }
  }
  sums[thread_index()] = sum;
  sync_block();
  if (warp_index() > 0 || column >= p.columns) return;
  for (int warp = 1; warp < kSumWarps; ++warp) sum += sums[warp * 32 + lane_index()];
  ref<V>(p.out, block_y() * p.columns + column) = sum;
}

template <class Storage>
cudaError_t sum_rows(const SumRowsParams& p, cudaStream_t stream) {
  using V = ComputeOf<Storage>;
  if (p.columns == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(divide_up(p.columns, 32));
  LaunchSize size = {blocks, kSumChunks, kSumThreads, kSumThreads * sizeof(V)};
  const SumParams first = {p.rows, p.columns, divide_up(p.rows, kSumChunks), p.in, p.partial};
  if (const auto error = launch(sum_rows_kernel<Storage, V>, size, stream, first)) return error;
  size.grid_y = 1;
  const SumParams second = {kSumChunks, p.columns, kSumChunks, p.partial, p.out};
  return launch(sum_rows_kernel<V, V>, size, stream, second);
}

}  // namespace lstmx::cuda
