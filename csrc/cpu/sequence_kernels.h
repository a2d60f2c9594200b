// A whole sequence of one layer and direction in one parallel region, generic over the cell and the
// dtypes. Compiled once for each instruction set: see vector.h.
//
// W_hh is packed once, masked on the way, into panels: all the columns of a few units, K-major, so
// that the micro-kernel streams through memory in order. The cell runs in the epilogue of each tile
// while it is still in the first-level cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../sequence.h"
#include "../walk.h"
#include "kernels.h"
#include "mask.h"
#include "pass.h"
#include "product.h"
#include "vector.h"

namespace lstmx::LSTMX_ISA {

// ---- Time and work ------------------------------------------------------------------------------

// Which rows and which unit tiles a member of the team works on. By rows there is no barrier, but
// every core reads all weights; by units each core keeps its share of the weights in its own cache.
struct Partition {
  int row_parts, unit_parts;

  static Partition make(const SequenceShape& shape, int64_t weight_bytes, int team) {
    const bool by_rows = weight_bytes <= (int64_t{1} << 20) && shape.batch >= 4 * team;
    return by_rows ? Partition{team, 1} : Partition{1, team};
  }
  Range rows(const SequenceShape& shape, int member) const {
    return row_parts > 1 ? share(shape.batch, member, row_parts) : Range{0, shape.batch};
  }
  Range tiles(int64_t count, int member) const {
    return unit_parts > 1 ? share(count, member, unit_parts) : Range{0, count};
  }
};

// A step must carry a few microseconds of work to pay for waking and awaiting a second thread.
inline int useful_threads(const SequenceShape& shape, int64_t weight_bytes, int threads) {
  return shape.batch * weight_bytes < 400000 ? 1 : threads;
}

// ---- Forward -----------------------------------------------------------------------------------

template <class Cell, class T, class Storage>
class Forward {
 public:
  using V = Vec<T>;
  static constexpr int G = Cell::kGates;

  Forward(const SequenceForwardParams& p, int threads)
      : p_(p),
        B_(p.shape.batch),
        H_(p.shape.hidden),
        Hp_(padded<T>(H_)),
        tiles_(Hp_ / V::kLanes),
        weight_bytes_(G * H_ * H_ * int64_t{sizeof(T)}),
        carver_(p.workspace) {
    panels_ = carver_.take<T>(tiles_ * panel_size());
    for (auto& bias : bias_) bias = carver_.take<T>(G * Hp_);
    h_next_ = carver_.take<T>(B_ * Hp_);
    for (auto& state : state_) state = carver_.take<T>(B_ * Hp_);
    scratch_ = carver_.take<T>(threads * scratch_size());
    masked_ = p.dropout.seed != nullptr && p.workspace != nullptr;
    if (masked_) rule_ = MaskRule::make(*p.dropout.seed, p.dropout.p);
  }

  int64_t workspace_bytes() const { return carver_.used(); }
  int64_t weight_bytes() const { return weight_bytes_; }

  void run(int member, int team) {
    const auto partition = Partition::make(p_.shape, weight_bytes_, team);
    const Range rows = partition.rows(p_.shape, member);
    const Range tiles = partition.tiles(tiles_, member);
    prepare(member, team);
    barrier_.wait(team);

    T* h = state_[0];
    T* h_next = h_next_;
    T* scratch = scratch_ + member * scratch_size();
    Walk walk(p_.shape, /*backward=*/false);
    while (walk.advance()) {
      const Range active = {rows.begin, std::min(rows.end, walk.rows)};
      for (int64_t tile = tiles.begin; tile < tiles.end && active.begin < active.end; ++tile) {
        multiply_panel<T, G>(h, Hp_, active, panels_ + tile * panel_size(), {0, H_}, scratch,
                             [&](int64_t row, int64_t count, const T* c) {
                               with_lanes<T>(H_ - tile * V::kLanes, [&](auto lanes) {
                                 finish(walk, tile, lanes, row, count, c, h, h_next);
                               });
                             });
      }
      if (partition.unit_parts > 1) barrier_.wait(team);
      std::swap(h, h_next);
    }
  }

 private:
  int64_t panel_size() const { return H_ * G * V::kLanes; }
  int64_t scratch_size() const { return B_ * G * V::kLanes; }

  void prepare(int member, int team) {
    const Range tiles = share(tiles_, member, team);
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      pack(tile, panels_ + tile * panel_size());
    }
    const Range rows = share(B_, member, team);
    for (int k = 0; k < Cell::kStates; ++k) {
      widen_rows(at<Storage>(p_.initial[k], rows.begin * H_), rows.end - rows.begin,
                 state_[k] + rows.begin * Hp_);
    }
    // Rows that join later (a packed sequence in reverse) find their initial state in either
    // buffer.
    widen_rows(at<Storage>(p_.initial[0], rows.begin * H_), rows.end - rows.begin,
               h_next_ + rows.begin * Hp_);
    if (member == 0) {
      widen_rows(at<Storage>(p_.b_ih, 0), G, bias_[0]);
      widen_rows(at<Storage>(p_.b_hh, 0), G, bias_[1]);
    }
  }

  // [count, H] storage, or null for zeros, to [count, Hp].
  void widen_rows(const Storage* from, int64_t count, T* to) const {
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t u = 0; u < Hp_; ++u) {
        to[row * Hp_ + u] = from && u < H_ ? T(widen(from[row * H_ + u])) : T(0);
      }
    }
  }

  // panel[k][g][lane] = W_hh[g * H + unit][k], masked; a block of columns at a time stays in cache.
  void pack(int64_t tile, T* panel) const {
    constexpr int64_t kBlock = 64;
    T factor[kBlock];
    for (int64_t k = 0; k < H_; k += kBlock) {
      const int64_t count = std::min(kBlock, H_ - k);
      for (int g = 0; g < G; ++g) {
        for (int lane = 0; lane < V::kLanes; ++lane) {
          const int64_t unit = tile * V::kLanes + lane;
          T* to = panel + (k * G + g) * V::kLanes + lane;
          const int64_t from = (g * H_ + unit) * H_ + k;
          const Storage* w = static_cast<const Storage*>(p_.w_hh) + from;
          if (unit >= H_) {
            for (int64_t i = 0; i < count; ++i) to[i * G * V::kLanes] = T(0);
          } else if (masked_) {
            mask_factors(rule_, from, from + count, factor);
            for (int64_t i = 0; i < count; ++i) to[i * G * V::kLanes] = widen(w[i]) * factor[i];
          } else {
            for (int64_t i = 0; i < count; ++i) to[i * G * V::kLanes] = widen(w[i]);
          }
        }
      }
    }
  }

  template <class Lanes>
  LSTMX_INLINE void finish(const Walk& walk, int64_t tile, Lanes lanes, int64_t first,
                           int64_t count, const T* c, const T* h, T* h_next) const {
    const int64_t unit = tile * V::kLanes;
    V bias_ih[G], bias_hh[G];
    for (int g = 0; g < G; ++g) {
      bias_ih[g] = load<T>(bias_[0] + g * Hp_ + unit);
      bias_hh[g] = load<T>(bias_[1] + g * Hp_ + unit);
    }
    for (int64_t row = first; row < first + count; ++row, c += G * V::kLanes) {
      const int64_t position = (walk.offset + row) * H_ + unit, inner = row * Hp_ + unit;
      const T* x_gates = at<T>(p_.x_gates, (walk.offset + row) * p_.x_gates_stride + unit);
      V gates_x[G], gates_h[G], prev[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved];
      for (int g = 0; g < G; ++g) {
        gates_x[g] = load<T>(x_gates + g * H_, lanes) + bias_ih[g];
        gates_h[g] = load<T>(c + g * V::kLanes) + bias_hh[g];
      }
      prev[0] = load<T>(h + inner);
      for (int k = 1; k < Cell::kStates; ++k) prev[k] = load<T>(state_[k] + inner);
      Cell::forward(gates_x, gates_h, prev, next, saved);

      // What the next step sees is what the caller gets: h rounded to its storage type.
      Storage* y = at<Storage>(p_.states[0], position);
      store(y, next[0], lanes);
      store(h_next + inner, sizeof(Storage) < sizeof(T) ? load<T>(y, lanes) : next[0]);
      for (int k = 1; k < Cell::kStates; ++k) {
        store(state_[k] + inner, next[k]);
        if (p_.states[k]) store(at<Storage>(p_.states[k], position), next[k], lanes);
      }
      if (p_.saved) {
        Storage* to = at<Storage>(p_.saved, (walk.offset + row) * Cell::kSaved * H_ + unit);
        for (int s = 0; s < Cell::kSaved; ++s) store(to + s * H_, saved[s], lanes);
      }
      if (row >= walk.next_rows) {
        for (int k = 0; k < Cell::kStates; ++k) {
          store(at<Storage>(p_.last[k], row * H_ + unit), next[k], lanes);
        }
      }
    }
  }

  const SequenceForwardParams& p_;
  const int64_t B_, H_, Hp_, tiles_, weight_bytes_;
  Carver carver_;
  T* panels_;                // [tiles][H][G][lanes]
  T* bias_[2];               // [G][Hp]: b_ih, b_hh
  T* state_[Cell::kStates];  // [B][Hp]; h's turns with h_next, the others change in place
  T* h_next_;                // [B][Hp]
  T* scratch_;               // [threads][B][G][lanes]
  bool masked_;
  MaskRule rule_;
  Barrier barrier_;
};

// ---- Backward ----------------------------------------------------------------------------------

template <class Cell, class T, class Storage>
class Backward {
 public:
  using V = Vec<T>;
  static constexpr int G = Cell::kGates, kGrads = Cell::kGrads;
  static constexpr int kVectors = 4;  // of units in a panel

  Backward(const SequenceBackwardParams& p, int threads)
      : p_(p),
        B_(p.shape.batch),
        H_(p.shape.hidden),
        Hp_(padded<T>(H_)),
        weight_bytes_(G * H_ * H_ * int64_t{sizeof(T)}),
        carver_(p.workspace) {
    panels_ = carver_.take<T>(G * H_ * Hp_);
    for (auto& carry : carry_) carry = carver_.take<T>(B_ * Hp_);
    bias_ = carver_.take<T>(threads * kGrads * Hp_);
    scratch_ = carver_.take<T>(threads * scratch_size());
    masked_ = p.dropout.seed != nullptr && p.workspace != nullptr;
    if (masked_) rule_ = MaskRule::make(*p.dropout.seed, p.dropout.p);
  }

  int64_t workspace_bytes() const { return carver_.used(); }
  int64_t weight_bytes() const { return weight_bytes_; }

  void run(int member, int team) {
    const auto partition = Partition::make(p_.shape, weight_bytes_, team);
    const Range rows = partition.rows(p_.shape, member);
    const Range vectors = partition.tiles(Hp_ / V::kLanes, member);
    // Both members of a pair must cut the vectors into the same panels.
    for (int other = 0; other < partition.unit_parts; ++other) {
      const Range mine = partition.tiles(Hp_ / V::kLanes, other);
      const Range packed = partition.unit_parts > 1 ? (other == member ? mine : Range{0, 0}) : mine;
      pack(packed, partition.unit_parts > 1 ? 0 : member, partition.unit_parts > 1 ? 1 : team);
    }
    prepare(member, team);
    barrier_.wait(team);

    T* scratch = scratch_ + member * scratch_size();
    T* bias = bias_ + (partition.row_parts > 1 ? member : 0) * kGrads * Hp_;
    Walk walk(p_.shape, /*backward=*/true);
    for (bool more = true; more;) {
      more = walk.advance();
      const Depth depth(G * H_, rows.end - rows.begin, sizeof(T));
      for (int64_t part = 0; part < depth.parts; ++part) {
        for (int64_t v = vectors.begin; v < vectors.end; v += kVectors) {
          T* sums = scratch + (v - vectors.begin) * V::kLanes * B_;
          with_vectors(vectors.end - v, [&](auto count) {
            step<count>(walk, v * V::kLanes, rows, depth.part(part), sums, bias);
          });
        }
      }
      if (partition.unit_parts > 1 || !more) barrier_.wait(team);
    }
    if (member == 0) sum_bias(partition.row_parts);
  }

 private:
  int64_t scratch_size() const { return B_ * Hp_; }

  // panel[row of W_hh][vector][lane], masked. The panels of `vectors` are dealt out to the parts.
  void pack(Range vectors, int part, int parts) const {
    const Range panels =
        share((vectors.end - vectors.begin + kVectors - 1) / kVectors, part, parts);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t v = vectors.begin + panel * kVectors;
      const int64_t width = std::min<int64_t>(kVectors, vectors.end - v) * V::kLanes;
      const int64_t unit = v * V::kLanes, count = std::min(width, H_ - unit);
      T factor[kVectors * V::kLanes];
      T* to = panels_ + unit * G * H_;
      for (int64_t row = 0; row < G * H_; ++row, to += width) {
        const int64_t from = row * H_ + unit;
        const Storage* w = static_cast<const Storage*>(p_.w_hh) + from;
        for (int64_t i = 0; i < count; ++i) to[i] = widen(w[i]);
        for (int64_t i = count; i < width; ++i) to[i] = T(0);
        if (masked_) {
          mask_factors(rule_, from, from + count, factor);
          for (int64_t i = 0; i < count; ++i) to[i] *= factor[i];
        }
      }
    }
  }

  void prepare(int member, int team) {
    const Range rows = share(B_, member, team);
    for (int k = 0; k < Cell::kStates; ++k) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const Storage* from = at<Storage>(p_.dlast[k], row * H_);
        for (int64_t u = 0; u < Hp_; ++u) {
          carry_[k][row * Hp_ + u] = from && u < H_ ? T(widen(from[u])) : T(0);
        }
      }
    }
    std::fill_n(bias_ + member * kGrads * Hp_, kGrads * Hp_, T(0));
  }

  // Rows that the step before (in time's reverse) computed gates for get W_hh^T dgates; of these,
  // the ones that have no step here end at the initial state.
  template <int kCount>
  void step(const Walk& walk, int64_t unit, Range rows, Range depth, T* sums, T* bias) const {
    const bool last = depth.end == G * H_;
    const auto clip = [&](int64_t end) { return std::clamp(end, rows.begin, rows.end); };
    const int64_t with_product = clip(walk.previous_rows);
    const int64_t all = clip(std::max(walk.previous_rows, walk.rows));
    const auto finish_tile = [&](int64_t row, int64_t count, const T* c) {
      if (!last) return;
      for (int n = 0; n < kCount; ++n) {
        const int64_t u = unit + n * V::kLanes;
        with_lanes<T>(H_ - u, [&](auto lanes) {
          finish(walk, u, lanes, row, count, c ? c + n * V::kLanes : nullptr, kCount * V::kLanes,
                 bias);
        });
      }
    };
    if (with_product > rows.begin) {
      const T* dgates =
          at<T>(p_.dgates, walk.previous_offset * kGrads * H_ + Cell::kHiddenGrads * H_);
      multiply_panel<T, kCount>(dgates, kGrads * H_, {rows.begin, with_product},
                                panels_ + unit * G * H_, depth, sums, finish_tile);
    }
    if (all > with_product) finish_tile(with_product, all - with_product, nullptr);
  }

  template <class Lanes>
  LSTMX_INLINE void finish(const Walk& walk, int64_t unit, Lanes lanes, int64_t first,
                           int64_t count, const T* c, int64_t c_stride, T* bias) const {
    V sum[kGrads];
    for (int g = 0; g < kGrads; ++g) sum[g] = V(T(0));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i, inner = row * Hp_ + unit;
      V dnext[Cell::kStates];
      for (int k = 0; k < Cell::kStates; ++k) dnext[k] = load<T>(carry_[k] + inner);
      if (c) dnext[0] = dnext[0] + load<T>(c + i * c_stride);
      if (row >= walk.rows) {
        for (int k = 0; k < Cell::kStates; ++k) {
          store(at<Storage>(p_.dinitial[k], row * H_ + unit), dnext[k], lanes);
        }
        continue;
      }
      const int64_t position = (walk.offset + row) * H_ + unit;
      V saved[Cell::kSaved], prev[Cell::kStates], next[Cell::kStates];
      for (int k = 0; k < Cell::kStates; ++k) {
        if (p_.dstates[k]) {
          dnext[k] = dnext[k] + load<T>(at<Storage>(p_.dstates[k], position), lanes);
        }
        next[k] = load<T>(at<Storage>(p_.states[k], position), lanes);
        const Storage* before =
            row < walk.next_rows ? at<Storage>(p_.states[k], (walk.next_offset + row) * H_ + unit)
                                 : at<Storage>(p_.initial[k], row * H_ + unit);
        prev[k] = load<T>(before, lanes);
      }
      const Storage* from = at<Storage>(p_.saved, (walk.offset + row) * Cell::kSaved * H_ + unit);
      for (int s = 0; s < Cell::kSaved; ++s) saved[s] = load<T>(from + s * H_, lanes);

      V dgates[kGrads], dprev[Cell::kStates];
      Cell::backward(saved, prev, next, dnext, dgates, dprev);

      T* to = at<T>(p_.dgates, (walk.offset + row) * kGrads * H_ + unit);
      for (int g = 0; g < kGrads; ++g) {
        store(to + g * H_, dgates[g], lanes);
        sum[g] = sum[g] + dgates[g];
      }
      for (int k = 0; k < Cell::kStates; ++k) store(carry_[k] + inner, dprev[k]);
    }
    for (int g = 0; g < kGrads; ++g) {
      T* to = bias + g * Hp_ + unit;
      store(to, load<T>(to) + sum[g]);
    }
  }

  void sum_bias(int parts) const {
    for (int g = 0; g < kGrads; ++g) {
      for (int64_t u = 0; u < H_; ++u) {
        T total = 0;
        for (int part = 0; part < parts; ++part) total += bias_[(part * kGrads + g) * Hp_ + u];
        at<T>(p_.dbias, 0)[g * H_ + u] = total;
      }
    }
  }

  const SequenceBackwardParams& p_;
  const int64_t B_, H_, Hp_, weight_bytes_;
  Carver carver_;
  T* panels_;                // for each panel [G*H][vectors][lanes]
  T* carry_[Cell::kStates];  // [B][Hp]: what has reached each state, but for W_hh's part
  T* bias_;                  // [threads][kGrads][Hp]
  T* scratch_;               // [threads], each [panel][B][vectors][lanes]: sums in the making
  bool masked_;
  MaskRule rule_;
  Barrier barrier_;
};

// ---- Recomputing the gates ---------------------------------------------------------------------

template <class Cell, class T, class Storage>
struct Recompute {
  using V = Vec<T>;
  static constexpr int G = Cell::kGates;
  const RecomputeParams& p;

  void run(int member, int team) const {
    const int64_t H = p.shape.hidden;
    Walk walk(p.shape, /*backward=*/false);
    while (walk.advance()) {
      const Range rows = share(walk.rows, member, team);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        for (int64_t unit = 0; unit < H; unit += V::kLanes) {
          const int64_t lanes = std::min<int64_t>(V::kLanes, H - unit);
          const int64_t gates = (walk.offset + row) * G * H + unit;
          V x[G], h[G], prev[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved];
          for (int g = 0; g < G; ++g) {
            x[g] = load<T>(at<T>(p.x_gates, gates + g * H), lanes);
            h[g] = load<T>(at<T>(p.h_gates, gates + g * H), lanes);
            if (p.b_ih) x[g] = x[g] + load<T>(at<Storage>(p.b_ih, g * H + unit), lanes);
            if (p.b_hh) h[g] = h[g] + load<T>(at<Storage>(p.b_hh, g * H + unit), lanes);
          }
          for (int k = 0; k < Cell::kStates; ++k) {
            const Storage* before =
                row < walk.previous_rows
                    ? at<Storage>(p.states[k], (walk.previous_offset + row) * H + unit)
                    : at<Storage>(p.initial[k], row * H + unit);
            prev[k] = load<T>(before, lanes);
          }
          Cell::forward(x, h, prev, next, saved);
          Storage* to = at<Storage>(p.saved, (walk.offset + row) * Cell::kSaved * H + unit);
          for (int s = 0; s < Cell::kSaved; ++s) store(to + s * H, saved[s], lanes);
        }
      }
    }
  }
};

// ---- The table ---------------------------------------------------------------------------------

template <class Pass, class Params>
int64_t workspace_of(const SequenceShape& shape, int threads) {
  Params p{};
  p.shape = shape;
  return Pass(p, threads).workspace_bytes();
}

template <class Pass, class Params>
void run_pass(const Params& p, int threads) {
  Pass pass(p, threads);
  run(useful_threads(p.shape, pass.weight_bytes(), threads), pass);
}

template <class Cell, class T, class Storage>
constexpr cpu::CellKernels cell_kernels() {
  using F = Forward<Cell, T, Storage>;
  using B = Backward<Cell, T, Storage>;
  return {workspace_of<F, SequenceForwardParams>,
          run_pass<F, SequenceForwardParams>,
          workspace_of<B, SequenceBackwardParams>,
          run_pass<B, SequenceBackwardParams>,
          [](const RecomputeParams& p, int threads) {
            Recompute<Cell, T, Storage> pass{p};
            run(threads, pass);
          },
          [](const SequenceShape& shape, int threads) {
            SequenceForwardParams p{};
            p.shape = shape;
            const int64_t bytes = F(p, threads).weight_bytes();
            const int team = useful_threads(shape, bytes, threads);
            return cpu::Plan{team, Partition::make(shape, bytes, team).row_parts > 1, bytes};
          }};
}

template <class T, class A, class B, class C>
constexpr cpu::ProductKernel product_kernel() {
  using P = Product<T, A, B, C>;
  return {[](const ProductParams& p, int threads) { return P(p, threads).workspace_bytes(); },
          [](const ProductParams& p, int threads) {
            P pass(p, threads);
            run(p.m * p.n * p.k < 100000 ? 1 : threads, pass);
          }};
}

template <class T, class Storage>
constexpr void fill_products(cpu::KernelTable& table, DType dtype) {
  table.storage_product[int(dtype)] = product_kernel<T, Storage, Storage, T>();
  table.compute_product[int(dtype)] = product_kernel<T, T, Storage, Storage>();
}

template <class Cell>
constexpr void fill_cell(cpu::CellKernels (&by_dtype)[kDTypes]) {
  by_dtype[int(DType::kFloat32)] = cell_kernels<Cell, float, float>();
  by_dtype[int(DType::kFloat64)] = cell_kernels<Cell, double, double>();
  by_dtype[int(DType::kBFloat16)] = cell_kernels<Cell, float, BFloat16>();
  by_dtype[int(DType::kFloat16)] = cell_kernels<Cell, float, Float16>();
}

constexpr cpu::KernelTable kernel_table(const char* name) {
  cpu::KernelTable table{};
  table.name = name;
  fill_cell<Lstm>(table.cells[int(CellKind::kLstm)]);
  fill_cell<Gru>(table.cells[int(CellKind::kGru)]);
  fill_products<float, float>(table, DType::kFloat32);
  fill_products<double, double>(table, DType::kFloat64);
  fill_products<float, BFloat16>(table, DType::kBFloat16);
  fill_products<float, Float16>(table, DType::kFloat16);
  table.mask_float = mask_elements<float>;
  table.mask_double = mask_elements<double>;
  return table;
}

}  // namespace lstmx::LSTMX_ISA
