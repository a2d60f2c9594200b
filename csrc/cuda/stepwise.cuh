// The kernels of the stepwise path, generic over cell and storage type: per step one product by
// cuBLAS and one of these; per sequence the weights' preparation and the sum for the biases.
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

// A thread for each unit; the blocks of a column share out the rows. Whatever a thread reads is
// asked for before any of it is used, be it only to widen it: each use before the last request is
// one more wait for the memory.
inline constexpr int kStepThreads = 128;
inline LaunchSize step_size(int64_t rows, int64_t units) {
  constexpr int64_t kMaxGridY = 65535;
  return {static_cast<unsigned>(divide_up(units, kStepThreads)),
          static_cast<unsigned>(std::min(rows, kMaxGridY)), kStepThreads};
}
LSTMX_DEVICE int64_t step_unit() { return int64_t{block_x()} * kStepThreads + thread_index(); }

// Whether the product adds h W_hh^T to x_gates, which spares the kernel after it half of what it
// reads. In float32 the product loses more by it (docs/adr/0012-steps-on-a-gpu.md).
template <class Cell, class Storage>
inline constexpr bool kSummed = Cell::kHalvesAdd && sizeof(Storage) == 2;

template <class Cell, class Storage>
LSTMX_KERNEL(kStepThreads)
forward_step_kernel(ForwardStepParams p) {
  using V = ComputeOf<Storage>;
  constexpr int G = Cell::kGates;
  const int64_t H = p.hidden, Hp = padded(H), unit = step_unit();
  if (unit >= H) return;
  Storage b_ih[G] = {}, b_hh[G] = {};
  LSTMX_UNROLL for (int g = 0; g < G; ++g) {
    if (p.b_ih) b_ih[g] = ref<Storage>(p.b_ih, g * H + unit);
    if (p.b_hh) b_hh[g] = ref<Storage>(p.b_hh, g * H + unit);
  }
  for (int64_t row = block_y(); row < p.rows; row += grid_y()) {
    V x[G], h[G] = {}, prev[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved];
    LSTMX_UNROLL for (int g = 0; g < G; ++g) {
      const int64_t gate = (row * G + g) * Hp + unit;
      x[g] = ref<V>(p.x_gates, gate);
      if constexpr (!kSummed<Cell, Storage>) h[g] = ref<V>(p.h_gates, gate);
      // Else the next step waits for the memory: x_gates of all steps are more than a cache holds.
      if (row < p.next_rows && lane_index() % 16 == 0) prefetch(&ref<V>(p.next_x_gates, gate));
    }
    const int64_t inner = row * H + unit;
    const Storage raw_h = ref<Storage>(p.h, row * Hp + unit);
    LSTMX_UNROLL for (int k = 1; k < Cell::kStates; ++k) prev[k] = ref<V>(p.carried[k], inner);

    prev[0] = widen(raw_h);
    LSTMX_UNROLL for (int g = 0; g < G; ++g) x[g] += widen(b_ih[g]), h[g] += widen(b_hh[g]);
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
  const bool exists = unit < H;  // else padding: of zeros, which have zeros as gradients
  const int64_t all = p.rows > p.product_rows ? p.rows : p.product_rows;
  for (int64_t row = block_y(); row < all; row += grid_y()) {
    const int64_t inner = row * H + unit;
    V product[Cell::kGates] = {}, dnext[kStates] = {};
    Storage raw_saved[kSaved] = {}, raw_prev[kStates] = {}, raw_next[kStates] = {},
            raw_dstates[kStates] = {};
    if (exists) {
      LSTMX_UNROLL for (int k = 0; k < kStates; ++k) dnext[k] = ref<V>(p.carry[k], inner);
      LSTMX_UNROLL for (int g = 0; g < Cell::kGates; ++g) {
        if (row < p.product_rows) product[g] = ref<V>(p.product, (g * p.batch + row) * Hp + unit);
      }
      if (row < p.rows) {
        // Else the next step waits for the memory, which alone holds what forward has left.
        const bool ahead = row < p.next_rows && lane_index() % 16 == 0;
        LSTMX_UNROLL for (int s = 0; s < kSaved; ++s) {
          const int64_t value = (row * kSaved + s) * H + unit;
          raw_saved[s] = ref<Storage>(p.saved, value);
          if (ahead) prefetch(&ref<Storage>(p.next_saved, value));
        }
        LSTMX_UNROLL for (int k = 0; k < kStates; ++k) {
          raw_prev[k] = ref<Storage>(row < p.previous_rows ? p.previous[k] : p.initial[k], inner);
          raw_next[k] = ref<Storage>(p.states[k], inner);
          if (p.dstates[k]) raw_dstates[k] = ref<Storage>(p.dstates[k], inner);
          if (ahead) prefetch(&ref<Storage>(p.next_previous[k], inner));
          if (ahead && p.dstates[k]) prefetch(&ref<Storage>(p.next_dstates[k], inner));
        }
      }
    }

    LSTMX_UNROLL for (int g = 0; g < Cell::kGates; ++g) dnext[0] += product[g];
    if (row >= p.rows) {
      if (exists) ref<V>(p.carry[0], inner) = dnext[0];
      continue;
    }
    V saved[kSaved], prev[kStates], next[kStates], dgates[kGrads], dprev[kStates];
    LSTMX_UNROLL for (int s = 0; s < kSaved; ++s) saved[s] = widen(raw_saved[s]);
    LSTMX_UNROLL for (int k = 0; k < kStates; ++k) {
      prev[k] = widen(raw_prev[k]);
      next[k] = widen(raw_next[k]);
      dnext[k] += V(widen(raw_dstates[k]));
    }
    Cell::backward(saved, prev, next, dnext, dgates, dprev);
    if (exists) {
      LSTMX_UNROLL for (int k = 0; k < kStates; ++k) ref<V>(p.carry[k], inner) = dprev[k];
    }
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

// A warp for each row, so that what concerns a row is worked out once for many elements. They are
// handled four at a time, as one Philox block covers them, and of several of these quads all loads
// come before the first store, which might change the next.
inline constexpr int kQuad = 4, kQuadsAtOnce = 3, kWeightWarps = 4;
inline LaunchSize weight_size(int64_t rows) {
  return {static_cast<unsigned>(divide_up(rows, kWeightWarps)), 1, 32 * kWeightWarps};
}
LSTMX_DEVICE int64_t weight_row() { return int64_t{block_x()} * kWeightWarps + warp_index(); }

// The mask of a matrix whose elements are counted row by row.
template <class V>
class RowMask {
 public:
  LSTMX_DEVICE explicit RowMask(const WeightDropout& dropout) : masked_(dropout.seed != nullptr) {
    if (!masked_) return;
    rule_ = MaskRule::make(*dropout.seed, dropout.p);
    scale_ = V(rule_.scale);
  }

  // to[k] = from[k] * factor, for the `count` elements of the matrix from `begin` on; from null:
  // ones.
  template <class From, class To>
  LSTMX_DEVICE void apply(int64_t begin, int count, const From* from, To* to) const {
    const int before = static_cast<int>(begin % kQuad);  // of the first quad, not of these elements
    const auto inside = [&](int k) { return k >= 0 && k < count; };
    for (int next = static_cast<int>(lane_index()); next * kQuad < before + count;
         next += 32 * kQuadsAtOnce) {
      From raw[kQuadsAtOnce][kQuad] = {};
      LSTMX_UNROLL for (int q = 0; q < kQuadsAtOnce; ++q) {
        const int first = (next + 32 * q) * kQuad - before;
        LSTMX_UNROLL for (int i = 0; i < kQuad; ++i) {
          if (from && inside(first + i)) raw[q][i] = from[first + i];
        }
      }
      LSTMX_UNROLL for (int q = 0; q < kQuadsAtOnce; ++q) {
        const int quad = next + 32 * q, first = quad * kQuad - before;
        if (first >= count) break;
        V values[kQuad];
        LSTMX_UNROLL for (int i = 0; i < kQuad; ++i) values[i] = from ? V(widen(raw[q][i])) : V(1);
        if (masked_) {
          auto block = philox_counter(begin / kQuad + quad);
          philox4x32_10(block, rule_.seed);
          LSTMX_UNROLL for (int i = 0; i < kQuad; ++i) {
            values[i] *= rule_.keeps(block.word[i]) ? scale_ : V(0);
          }
        }
        LSTMX_UNROLL for (int i = 0; i < kQuad; ++i) {
          if (inside(first + i)) narrow(values[i], to[first + i]);
        }
      }
    }
  }

 private:
  bool masked_;
  MaskRule rule_;
  V scale_ = 1;
};

// Of a row of all gates, in 32 bits, in which a GPU divides several times faster.
struct GateRow {
  LSTMX_DEVICE GateRow(int64_t row, int64_t units)
      : gate(static_cast<unsigned>(row) / static_cast<unsigned>(units)),
        unit(static_cast<unsigned>(row) % static_cast<unsigned>(units)) {}
  int64_t gate, unit;
};

LSTMX_DEVICE int64_t rotated(int64_t gate, int64_t rotation, int64_t gates) {
  const int64_t place = gate + rotation;
  return place < gates ? place : place - gates;
}

template <class Storage>
LSTMX_KERNEL(32 * kWeightWarps)
prepare_kernel(WeightParams p) {
  using V = ComputeOf<Storage>;
  const int64_t Hp = padded(p.hidden), K = p.columns, Kp = padded(K), wide = weight_row();
  if (wide >= p.gates * Hp) return;
  const RowMask<V> mask(p.dropout);
  const GateRow to(wide, Hp);
  const bool exists = to.unit < p.hidden;
  if (exists) {
    const int64_t row = rotated(to.gate, p.gates - p.rotation, p.gates) * p.hidden + to.unit;
    mask.apply(row * K, static_cast<int>(K), &ref<Storage>(p.from, row * K),
               &ref<Storage>(p.to, wide * Kp));
  }
  for (int64_t k = (exists ? K : 0) + lane_index(); k < Kp; k += 32) {
    narrow(V(0), ref<Storage>(p.to, wide * Kp + k));
  }
}

template <class Storage>
LSTMX_KERNEL(32 * kWeightWarps)
finish_kernel(WeightParams p) {
  using V = ComputeOf<Storage>;
  const int64_t K = p.columns, row = weight_row();
  if (row >= p.gates * p.hidden) return;
  const RowMask<V> mask(p.dropout);
  const GateRow from(row, p.hidden);
  const int64_t gate = rotated(from.gate, p.rotation, p.gates);
  const int64_t wide = gate * padded(p.hidden) + from.unit;
  mask.apply(row * K, static_cast<int>(K), &ref<V>(p.from, wide * padded(K)),
             &ref<Storage>(p.to, row * K));
}

// As of a matrix with rows of this many elements.
inline constexpr int kMaskRow = 32 * kQuad * kQuadsAtOnce;
template <class V>
LSTMX_KERNEL(32 * kWeightWarps)
mask_kernel(MaskParams p) {
  const int64_t begin = weight_row() * kMaskRow, left = p.count - begin;
  if (left <= 0) return;
  const RowMask<V> mask(p.dropout);
  mask.apply(begin, left < kMaskRow ? static_cast<int>(left) : kMaskRow,
             static_cast<const V*>(nullptr), &ref<V>(p.out, begin));
}

inline cudaError_t launch_for_rows(void (*kernel)(WeightParams), int64_t rows,
                                   const WeightParams& p, cudaStream_t stream) {
  if (rows == 0 || p.columns == 0) return cudaSuccess;
  if (p.columns > INT32_MAX) return cudaErrorInvalidValue;
  return launch(kernel, weight_size(rows), stream, p);
}
template <class Storage>
cudaError_t prepare(const WeightParams& p, cudaStream_t stream) {
  return launch_for_rows(prepare_kernel<Storage>, p.gates * padded(p.hidden), p, stream);
}
template <class Storage>
cudaError_t finish(const WeightParams& p, cudaStream_t stream) {
  return launch_for_rows(finish_kernel<Storage>, p.gates * p.hidden, p, stream);
}
template <class Storage>
cudaError_t mask(const MaskParams& p, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  const auto size = weight_size(divide_up(p.count, kMaskRow));
  return launch(mask_kernel<ComputeOf<Storage>>, size, stream, p);
}

// ---- Sums of columns ----------------------------------------------------------------------------

inline constexpr int kSumWarps = 8, kSumThreads = 32 * kSumWarps, kSumColumns = 4;

struct SumParams {
  int64_t rows, columns, rows_per_block;
  const void* in;
  void* out;  // [grid_y, columns]
};

// kSumColumns columns for each lane, read at once; the warps of a block, then the blocks of a
// column, share out the rows.
template <class In, class V>
LSTMX_KERNEL(kSumThreads)
sum_rows_kernel(SumParams p) {
  struct alignas(sizeof(In) < 4 ? 8 : 16) Read {
    In value[kSumColumns];
  };
  using Sums = V[32][kSumColumns];
  Sums* sums = shared_memory<Sums>();  // [kSumWarps]
  const unsigned lane = lane_index(), warp = warp_index();
  const int64_t column = (int64_t{block_x()} * 32 + lane) * kSumColumns;
  const int64_t begin = block_y() * p.rows_per_block;
  const int64_t end = begin + p.rows_per_block < p.rows ? begin + p.rows_per_block : p.rows;
  V sum[kSumColumns] = {};
  if (column < p.columns) {
    for (int64_t row = begin + warp; row < end; row += kSumWarps) {
      const auto read = *reinterpret_cast<const Read*>(&ref<In>(p.in, row * p.columns + column));
      LSTMX_UNROLL for (int i = 0; i < kSumColumns; ++i) sum[i] += V(widen(read.value[i]));
    }
  }
  LSTMX_UNROLL for (int i = 0; i < kSumColumns; ++i) sums[warp][lane][i] = sum[i];
  sync_block();
  if (warp > 0 || column >= p.columns) return;
  LSTMX_UNROLL for (int i = 0; i < kSumColumns; ++i) {
    for (int other = 1; other < kSumWarps; ++other) sum[i] += sums[other][lane][i];
    ref<V>(p.out, block_y() * p.columns + column + i) = sum[i];
  }
}

template <class Storage>
cudaError_t sum_rows(const SumRowsParams& p, cudaStream_t stream) {
  using V = ComputeOf<Storage>;
  if (p.columns == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(divide_up(p.columns, 32 * kSumColumns));
  LaunchSize size = {blocks, kSumChunks, kSumThreads, kSumThreads * kSumColumns * sizeof(V)};
  const SumParams first = {p.rows, p.columns, divide_up(p.rows, kSumChunks), p.in, p.partial};
  if (const auto error = launch(sum_rows_kernel<Storage, V>, size, stream, first)) return error;
  size.grid_y = 1;
  const SumParams second = {kSumChunks, p.columns, kSumChunks, p.partial, p.out};
  return launch(sum_rows_kernel<V, V>, size, stream, second);
}

}  // namespace lstmx::cuda
