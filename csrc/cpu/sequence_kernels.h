// A whole sequence of one layer and direction in one parallel region, generic over the cell and the
// dtypes. Compiled once for each instruction set: see vector.h.
//
// W_hh is packed once, masked on the way, into panels: all the columns of a few units, K-major, so
// that the micro-kernel streams through memory in order. The cell runs in the epilogue of each tile
// while it is still in the first-level cache.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../sequence.h"
#include "../walk.h"
#include "kernels.h"
#include "mask.h"
#include "matrix_unit.h"
#include "pack.h"
#include "pass.h"
#include "product.h"
#include "vector.h"

namespace lstmx::LSTMX_ISA {

// ---- Time and work ------------------------------------------------------------------------------

// What stays in the second-level cache of a core from one step to the next, with all else.
inline bool stays_near(int64_t bytes) { return bytes <= cpu::second_level_bytes() * 3 / 4; }

// Whether panels, `bytes` of them at each step for so many rows, need not be fetched ahead. Of a
// few MB in the third level, the processor's own prefetches bring a few rows what they need.
inline bool comes_by_itself(int64_t bytes, int64_t rows) {
  constexpr int64_t kFewRows = 8, kFewBytes = int64_t{4} << 20;
  return stays_near(bytes) || (LSTMX_VECTOR_BYTES < 64 && rows < kFewRows && bytes <= kFewBytes);
}

// Which rows and which unit tiles a member of the team works on. By rows there is no barrier, but
// every core reads all weights; by units each core keeps its share of the weights in its own cache.
struct Partition {
  int row_parts, unit_parts;

  static Partition make(const SequenceShape& shape, int64_t weight_bytes, int team) {
    const bool by_rows = stays_near(weight_bytes) && shape.batch >= 4 * team;
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

// O is what h and W_hh are multiplied as: T, or Storage in pairs.
template <class Cell, class T, class Storage, class O>
class Forward {
 public:
  using V = Vec<T>;
  static constexpr int G = Cell::kGates;

  Forward(const SequenceForwardParams& p, int threads)
      : p_(p),
        B_(p.shape.batch),
        H_(p.shape.hidden),
        Hp_(padded<T>(H_)),
        h_row_(panel_rows<O>(Hp_)),
        I_(p.shape.inputs),
        units_{p.unit_begin, p.unit_end > 0 ? p.unit_end : H_},
        tiles_(padded<T>(units_.end - units_.begin) / V::kLanes),
        weight_bytes_(G * (units_.end - units_.begin) * H_ * int64_t{sizeof(O)}),
        parts_(useful_threads(p.shape, weight_bytes_, threads)),
        carver_(p.workspace) {
    panels_ = carver_.take<O>(tiles_ * panel_size(H_));
    input_panels_ = carver_.take<O>(tiles_ * panel_size(I_));
    for (auto& bias : bias_) bias = carver_.take<T>(G * Hp_);
    for (auto& h : h_) h = carver_.take<O>(B_ * h_row_);
    for (auto& state : state_) state = carver_.take<T>(B_ * Hp_);
    scratch_ = carver_.take<T>(2 * threads * scratch_size());
    mask_ = Mask::make(p.dropout);
  }

  int64_t workspace_bytes() const { return carver_.used(); }
  int64_t weight_bytes() const { return weight_bytes_; }

  // x's gates need not pass through memory if each step multiplies its own x. That reads W_ih at
  // each step, which must not take longer than what it saves.
  static bool fuses_input(const SequenceShape& shape, int64_t inputs, int threads) {
    if (!std::is_same_v<Storage, O> || inputs == 0 || inputs % kGroup<O> != 0) return false;
    const int64_t weight_bytes = G * shape.hidden * shape.hidden * int64_t{sizeof(O)};
    const int64_t panels = weight_bytes / shape.hidden * (shape.hidden + inputs);
    const auto partition =
        Partition::make(shape, panels, useful_threads(shape, weight_bytes, threads));
    const int64_t rows = shape.batch / partition.row_parts;
    const bool cached = stays_near(panels / partition.unit_parts);
    if (by_unit<O>()) return rows >= (cached ? 4 : 32);
    // Cycles for each line of weights: read from the second-level cache or from the third, and
    // multiplied, two rows at once. What multiplying does not hide of the reading is set against
    // x's gates, which would be written and read.
    const int64_t read = cached ? 2 : 5;
    return inputs * int64_t{sizeof(O)} * (2 * read - rows) <=
           2 * read * rows * 2 * int64_t{sizeof(T)};
  }

  void run(int member, int team) {
    const int64_t panel_bytes = weight_bytes_ / H_ * (H_ + I_);
    const auto partition = Partition::make(p_.shape, panel_bytes, parts_);
    const bool near = comes_by_itself(panel_bytes / partition.unit_parts, B_ / partition.row_parts);
    prepare(member, team);
    barrier_.wait(team);

    O *h = h_[0], *h_next = h_[1];
    T* scratch = scratch_ + 2 * member * scratch_size();
    T* input_scratch = scratch + scratch_size();
    Walk walk(p_.shape, /*backward=*/false);
    for (bool zeros = p_.from_zero; walk.advance(); zeros = false) {
      for (int part = member; part < parts_; part += team) {
        // By units, a tile on the border of two parts is cut by its rows.
        const Range work = partition.tiles(tiles_ * B_, part),
                    rows = partition.rows(p_.shape, part);
        for (int64_t tile = work.begin / std::max<int64_t>(1, B_); tile * B_ < work.end; ++tile) {
          const Range active = {
              std::max(rows.begin, work.begin - tile * B_),
              std::min({rows.end, walk.rows, work.end - tile * B_}),
          };
          if (active.begin >= active.end) continue;
          const O* hidden_panel = panels_ + tile * panel_size(H_);
          const int64_t next = (tile + 1) * B_ < work.end ? tile + 1 : work.begin / B_;
          const O* next_panel =
              I_ > 0 ? input_panels_ + next * panel_size(I_) : panels_ + next * panel_size(H_);
          if (I_ > 0) {
            multiply_panel<T>(
                G, at<O>(p_.x, walk.offset * I_), I_, active, input_panels_ + tile * panel_size(I_),
                Next<O>{hidden_panel, near}, {0, I_}, input_scratch, [](int64_t, int64_t) {},
                [](int64_t, int64_t, const T*) {});
          }
          const int64_t unit = first_unit(tile);
          const auto finish_rows = [&](int64_t row, int64_t count, const T* c) {
            const T* cx = input_scratch + (c - scratch);
            with_lanes<T>(H_ - unit, [&](auto lanes) {
              finish(walk, unit, lanes, row, count, c, cx, h, h_next);
            });
          };
          if (zeros) {
            const int64_t count = active.end - active.begin;
            std::fill_n(scratch, count * G * V::kLanes, T(0));
            finish_rows(active.begin, count, scratch);
            continue;
          }
          // To the unit, zeros are as good as a rest of its own.
          const Range depth = {0, by_unit<O>() ? h_row_ : grouped<O>(H_)};
          multiply_panel<T>(
              G, h, h_row_, active, hidden_panel, Next<O>{next_panel, near}, depth, scratch,
              [&](int64_t row, int64_t count) { fetch(walk, unit, row, count); }, finish_rows);
        }
      }
      if (partition.unit_parts > 1) barrier_.wait(team);
      std::swap(h, h_next);
    }
    release_unit<O>();
  }

 private:
  int64_t panel_size(int64_t depth) const { return panel_rows<O>(depth) * G * V::kLanes; }
  int64_t scratch_size() const { return B_ * G * V::kLanes; }
  int64_t first_unit(int64_t tile) const { return units_.begin + tile * V::kLanes; }

  void prepare(int member, int team) {
    const Range tiles = share(p_.packed ? 0 : tiles_, member, team);
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      pack(tile, p_.w_hh, H_, mask_, panels_);
      if (I_ > 0) pack(tile, p_.w_ih, I_, Mask{}, input_panels_);
    }
    const Range rows = share(B_, member, team);
    const auto widen_initial = [&](int k, auto* to, int64_t width) {
      widen_rows(at<Storage>(p_.initial[k], rows.begin * H_), rows.end - rows.begin,
                 to + rows.begin * width, width);
    };
    // Rows that join later (a packed sequence in reverse) find their initial state in either
    // buffer.
    for (O* h : h_) widen_initial(0, h, h_row_);
    for (int k = 1; k < Cell::kStates; ++k) widen_initial(k, state_[k - 1], Hp_);
    if (member == 0) {
      widen_rows(at<Storage>(p_.b_ih, 0), G, bias_[0], Hp_);
      widen_rows(at<Storage>(p_.b_hh, 0), G, bias_[1], Hp_);
    }
  }

  // [count, H] storage, or null for zeros, to [count, width].
  template <class To>
  void widen_rows(const Storage* from, int64_t count, To* to, int64_t width) const {
    for (int64_t row = 0; row < count; ++row) {
      copy_run(from + (from ? row * H_ : 0), from ? H_ : 0, width, Mask{}, 0, to + row * width);
    }
  }

  // panel[k][g][lane] = w[g * H + unit][k], masked; w is [G*H, depth].
  void pack(int64_t tile, const void* w, int64_t depth, const Mask& mask, O* panels) const {
    O* panel = panels + tile * panel_size(depth);
    const int64_t unit = first_unit(tile);
    for (int g = 0; g < G; ++g) {
      const int64_t element = (g * H_ + unit) * depth;
      pack_turned(at<Storage>(w, element), depth, H_ - unit, depth, mask, element, G * V::kLanes,
                  panel + g * V::kLanes * kGroup<O>);
    }
    std::fill(panel + grouped<O>(depth) * G * V::kLanes, panel + panel_size(depth), O{});
  }

  LSTMX_INLINE bool saves(const Walk& walk) const {
    return p_.saved && walk.offset >= p_.saved_begin && walk.offset < p_.saved_end;
  }
  LSTMX_INLINE Storage* saved_at(int64_t row, int64_t unit) const {
    return at<Storage>(p_.saved, (row - p_.saved_begin) * p_.saved_row + unit);
  }

  // What finish meets that is not in the cache: mostly where it writes.
  LSTMX_INLINE void fetch(const Walk& walk, int64_t unit, int64_t first, int64_t count) const {
    for (int64_t row = walk.offset + first; row < walk.offset + first + count; ++row) {
      for (int k = 0; k < Cell::kStates; ++k) {
        if (p_.states[k]) fetch_run(at<Storage>(p_.states[k], row * H_ + unit), V::kLanes);
      }
      for (int s = 0; saves(walk) && s < Cell::kSaved; ++s) {
        fetch_run(saved_at(row, unit) + s * H_, V::kLanes);
      }
      for (int g = 0; I_ == 0 && g < G; ++g) {
        fetch_run(at<T>(p_.x_gates, row * p_.x_gates_stride + g * H_ + unit), V::kLanes);
      }
    }
  }

  // c and cx are what h and x give.
  template <class Lanes>
  LSTMX_CALL void finish(const Walk& walk, int64_t unit, Lanes lanes, int64_t first, int64_t count,
                         const T* c, const T* cx, const O* h, O* h_next) const {
    const int64_t gate_stride = I_ > 0 ? V::kLanes : H_;
    const bool save = saves(walk);
    const V scale(static_cast<T>(mask_.scale));
    V bias_ih[G], bias_hh[G];
    for (int g = 0; g < G; ++g) {
      bias_ih[g] = load<T>(bias_[0] + g * Hp_ + unit);
      bias_hh[g] = load<T>(bias_[1] + g * Hp_ + unit);
    }
    by_rows<kRowsTogether>(count, [&](auto rows, int64_t from) __attribute__((always_inline)) {
      using R = Rows<T, rows>;
      R gates_x[G], gates_h[G], prev[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved];
      repeat<rows>([&](int i) __attribute__((always_inline)) {
        const int64_t row = first + from + i;
        const T* x_gates = I_ > 0
                               ? cx + (from + i) * G * V::kLanes
                               : at<T>(p_.x_gates, (walk.offset + row) * p_.x_gates_stride + unit);
        const T* h_gates = c + (from + i) * G * V::kLanes;
        for (int g = 0; g < G; ++g) {
          gates_x[g].row[i] = load<T>(x_gates + g * gate_stride, lanes) + bias_ih[g];
          gates_h[g].row[i] = load<T>(h_gates + g * V::kLanes) * scale + bias_hh[g];
        }
        prev[0].row[i] = load<T>(h + row * h_row_ + unit);
        for (int k = 1; k < Cell::kStates; ++k) {
          prev[k].row[i] = load<T>(state_[k - 1] + row * Hp_ + unit);
        }
      });
      Cell::forward(gates_x, gates_h, prev, next, saved);
      repeat<rows>([&](int i) __attribute__((always_inline)) {
        const int64_t row = first + from + i, position = (walk.offset + row) * H_ + unit;
        // What the next step sees is what the caller gets: h rounded to its storage type.
        Storage* y = at<Storage>(p_.states[0], position);
        store(y, next[0].row[i], lanes);
        store(h_next + row * h_row_ + unit,
              sizeof(Storage) < sizeof(O) ? load<T>(y, lanes) : next[0].row[i]);
        for (int k = 1; k < Cell::kStates; ++k) {
          store(state_[k - 1] + row * Hp_ + unit, next[k].row[i]);
          if (p_.states[k]) store(at<Storage>(p_.states[k], position), next[k].row[i], lanes);
        }
        if (save) {
          Storage* to = saved_at(walk.offset + row, unit);
          for (int s = 0; s < Cell::kSaved; ++s) store(to + s * H_, saved[s].row[i], lanes);
        }
        if (row >= walk.next_rows) {
          for (int k = 0; k < Cell::kStates; ++k) {
            store(at<Storage>(p_.last[k], row * H_ + unit), next[k].row[i], lanes);
          }
        }
      });
    });
  }

  const SequenceForwardParams& p_;
  const int64_t B_, H_, Hp_, h_row_, I_;
  const Range units_;
  const int64_t tiles_, weight_bytes_;
  const int parts_;  // of the work, whatever the size of the team
  Carver carver_;
  O* panels_;                                // [tiles][H][G][lanes]
  O* input_panels_;                          // [tiles][I][G][lanes]
  T* bias_[2];                               // [G][Hp]: b_ih, b_hh
  O* h_[2];                                  // [B][h_row]: of this step and the next
  std::array<T*, Cell::kStates - 1> state_;  // [B][Hp]: the other states, which change in place
  T* scratch_;                               // [threads][2][B][G][lanes]: of h, of x
  Mask mask_;
  Barrier barrier_;
};

// ---- Backward ----------------------------------------------------------------------------------

// O as in Forward: of the gates' gradients and W_hh.
template <class Cell, class T, class Storage, class O>
class Backward {
 public:
  using V = Vec<T>;
  static constexpr int G = Cell::kGates, kGrads = Cell::kGrads;
  static constexpr int kBackwardRows = kRowsTogether / 2;

  Backward(const SequenceBackwardParams& p, int threads)
      : p_(p),
        B_(p.shape.batch),
        H_(p.shape.hidden),
        Hp_(padded<T>(H_)),
        weight_bytes_(G * H_ * H_ * int64_t{sizeof(O)}),
        parts_(useful_threads(p.shape, weight_bytes_, threads)),
        partition_(Partition::make(p.shape, weight_bytes_, parts_)),
        lead_(grouped<O>(G * H_) - G * H_),
        panel_rows_(panel_rows<O>(lead_ + G * H_)),
        carver_(p.workspace) {
    panels_ = carver_.take<O>(panel_rows_ * Hp_);
    for (auto& carry : carry_) carry = carver_.take<T>(B_ * Hp_);
    bias_ = carver_.take<T>(threads * kGrads * Hp_);
    scratch_ = carver_.take<T>(parts_ * scratch_size());
    mask_ = Mask::make(p.dropout);
  }

  int64_t workspace_bytes() const { return carver_.used(); }
  int64_t weight_bytes() const { return weight_bytes_; }

  // The work is cut into parts by the number of threads asked for, not by the size of the team that
  // came: the sums of the biases' gradients must not depend on what else the machine does.
  void run(int member, int team) {
    const bool near =
        comes_by_itself(weight_bytes_ / partition_.unit_parts, B_ / partition_.row_parts);
    const auto vectors_of = [&](int part) { return partition_.tiles(Hp_ / V::kLanes, part); };
    if (partition_.unit_parts > 1) {
      for (int part = member; part < parts_; part += team) pack(vectors_of(part), 0, 1);
    } else {
      pack(vectors_of(0), member, team);
    }
    prepare(member, team);
    barrier_.wait(team);

    Walk walk(p_.shape, /*backward=*/true);
    for (bool more = true; more;) {
      more = walk.advance();
      for (int part = member; part < parts_; part += team) {
        const Range rows = partition_.rows(p_.shape, part), vectors = vectors_of(part);
        T* scratch = scratch_ + part * scratch_size();
        T* bias = bias_ + (partition_.row_parts > 1 ? part : 0) * kGrads * Hp_;
        const Depth depth(lead_ + G * H_, rows.end - rows.begin, sizeof(O), depth_step<O>());
        for (int64_t d = 0; d < depth.parts; ++d) {
          for (int64_t v = vectors.begin; v < vectors.end; v += kMostVectors) {
            T* sums = scratch + (v - vectors.begin) * V::kLanes * (rows.end - rows.begin);
            const int64_t next = v + kMostVectors < vectors.end ? v + kMostVectors : vectors.begin;
            const Next<O> next_panel = {panel_at(next * V::kLanes), near};
            const int count = int(std::min<int64_t>(kMostVectors, vectors.end - v));
            step(walk, v * V::kLanes, count, next_panel, rows, depth.part(d), sums, bias);
          }
        }
      }
      if (partition_.unit_parts > 1 || !more) barrier_.wait(team);
    }
    release_unit<O>();
    if (member == 0) sum_bias(partition_.row_parts);
  }

 private:
  // Of the largest part.
  int64_t scratch_size() const {
    const int64_t rows = (B_ + partition_.row_parts - 1) / partition_.row_parts;
    const int64_t vectors = (Hp_ / V::kLanes + partition_.unit_parts - 1) / partition_.unit_parts;
    return rows * vectors * V::kLanes;
  }
  O* panel_at(int64_t unit) const { return panels_ + unit * panel_rows_; }

  // panel[row of W_hh][vector][lane], masked. The panels of `vectors` are dealt out to the parts.
  void pack(Range vectors, int part, int parts) const {
    if (!p_.w_hh || p_.packed) return;
    const Range panels =
        share((vectors.end - vectors.begin + kMostVectors - 1) / kMostVectors, part, parts);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t v = vectors.begin + panel * kMostVectors;
      const int64_t width = std::min<int64_t>(kMostVectors, vectors.end - v) * V::kLanes;
      const int64_t unit = v * V::kLanes, count = std::min(width, H_ - unit);
      pack_straight<kMostVectors * V::kLanes>(at<Storage>(p_.w_hh, unit), H_, count, G * H_, lead_,
                                              /*rotation=*/0, mask_, unit, width, panel_at(unit));
      std::fill(panel_at(unit) + (lead_ + G * H_) * width, panel_at(unit) + panel_rows_ * width,
                O{});
    }
  }

  void prepare(int member, int team) {
    const Range rows = share(B_, member, team);
    for (int k = 0; k < Cell::kStates; ++k) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const Storage* from = at<Storage>(p_.dlast[k], row * H_);
        copy_run(from, from ? H_ : 0, Hp_, Mask{}, 0, carry_[k] + row * Hp_);
      }
    }
    for (int part = member; part < parts_; part += team) {
      std::fill_n(bias_ + part * kGrads * Hp_, kGrads * Hp_, T(0));
    }
  }

  // Rows that the step before (in time's reverse) computed gates for get W_hh^T dgates; of these,
  // the ones that have no step here end at the initial state.
  void step(const Walk& walk, int64_t unit, int vectors, Next<O> next_panel, Range rows,
            Range depth, T* sums, T* bias) const {
    const bool last = depth.end == lead_ + G * H_;
    const auto clip = [&](int64_t end) { return std::clamp(end, rows.begin, rows.end); };
    // What would only reach the gradient of the initial h is left out where that is not wanted.
    const int64_t wanted = p_.dinitial[0] ? walk.previous_rows : walk.rows;
    const int64_t with_product = p_.w_hh ? clip(std::min(wanted, walk.previous_rows)) : rows.begin;
    const int64_t all = clip(std::max(walk.previous_rows, walk.rows));
    const auto finish_tile = [&](int64_t row, int64_t count, const T* c) {
      if (!last) return;
      for (int n = 0; n < vectors; ++n) {
        const int64_t u = unit + n * V::kLanes;
        with_lanes<T>(H_ - u, [&](auto lanes) {
          finish(walk, u, lanes, row, count, c ? c + n * V::kLanes : nullptr, vectors * V::kLanes,
                 bias);
        });
      }
    };
    if (with_product > rows.begin) {
      // The column before, if one leads, meets a row of zeros.
      const O* dgates =
          at<O>(p_.dgates, walk.previous_offset * p_.dgates_row + Cell::kHiddenGrads * H_ - lead_);
      multiply_panel<T>(
          vectors, dgates, p_.dgates_row, {rows.begin, with_product},
          const_cast<const O*>(panel_at(unit)), next_panel, depth, sums,
          [&](int64_t row, int64_t count) {
            if (last) fetch(walk, unit, vectors * V::kLanes, row, count);
          },
          finish_tile);
    }
    if (all > with_product) finish_tile(with_product, all - with_product, nullptr);
  }

  // What finish meets that is not in the cache.
  LSTMX_INLINE void fetch(const Walk& walk, int64_t unit, int64_t units, int64_t first,
                          int64_t count) const {
    for (int64_t row = first; row < std::min(first + count, walk.rows); ++row) {
      const int64_t here = walk.offset + row;
      for (int k = 0; k < Cell::kStates; ++k) {
        if (p_.dstates[k]) fetch_run(at<Storage>(p_.dstates[k], here * H_ + unit), units);
        fetch_run(at<Storage>(p_.states[k], here * H_ + unit), units);
        fetch_run(state_before(walk, k, row, unit), units);
      }
      for (int s = 0; s < Cell::kSaved; ++s) {
        fetch_run(at<Storage>(p_.saved, here * p_.saved_row + s * H_ + unit), units);
      }
      for (int g = 0; g < kGrads; ++g) {
        fetch_run(at<O>(p_.dgates, here * p_.dgates_row + g * H_ + unit), units);
      }
    }
  }

  // Of state k, what a step found.
  LSTMX_INLINE const Storage* state_before(const Walk& walk, int k, int64_t row,
                                           int64_t unit) const {
    return row < walk.next_rows ? at<Storage>(p_.states[k], (walk.next_offset + row) * H_ + unit)
                                : at<Storage>(p_.initial[k], row * H_ + unit);
  }

  template <class Lanes>
  LSTMX_CALL void finish(const Walk& walk, int64_t unit, Lanes lanes, int64_t first, int64_t count,
                         const T* c, int64_t c_stride, T* bias) const {
    const V scale(static_cast<T>(mask_.scale));
    const auto dh = [&](int64_t i) __attribute__((always_inline)) {
      const V carried = load<T>(carry_[0] + (first + i) * Hp_ + unit);
      return c ? carried + load<T>(c + i * c_stride) * scale : carried;
    };
    V sum[kGrads];
    for (int g = 0; g < kGrads; ++g) sum[g] = V(T(0));
    const int64_t active = std::clamp<int64_t>(walk.rows - first, 0, count);
    by_rows<kBackwardRows>(active, [&](auto rows, int64_t from) __attribute__((always_inline)) {
      using R = Rows<T, rows>;
      R saved[Cell::kSaved], prev[Cell::kStates], next[Cell::kStates], dnext[Cell::kStates];
      repeat<rows>([&](int i) __attribute__((always_inline)) {
        const int64_t row = first + from + i, position = (walk.offset + row) * H_ + unit;
        for (int k = 0; k < Cell::kStates; ++k) {
          dnext[k].row[i] = k == 0 ? dh(from + i) : load<T>(carry_[k] + row * Hp_ + unit);
          if (p_.dstates[k]) {
            dnext[k].row[i] =
                dnext[k].row[i] + load<T>(at<Storage>(p_.dstates[k], position), lanes);
          }
          next[k].row[i] = load<T>(at<Storage>(p_.states[k], position), lanes);
          prev[k].row[i] = load<T>(state_before(walk, k, row, unit), lanes);
        }
        const Storage* of = at<Storage>(p_.saved, (walk.offset + row) * p_.saved_row + unit);
        for (int s = 0; s < Cell::kSaved; ++s) saved[s].row[i] = load<T>(of + s * H_, lanes);
      });
      R dgates[kGrads], dprev[Cell::kStates];
      Cell::backward(saved, prev, next, dnext, dgates, dprev);
      repeat<rows>([&](int i) __attribute__((always_inline)) {
        const int64_t row = first + from + i;
        O* to = at<O>(p_.dgates, (walk.offset + row) * p_.dgates_row + unit);
        for (int g = 0; g < kGrads; ++g) {
          store(to + g * H_, dgates[g].row[i], lanes);
          sum[g] = sum[g] + dgates[g].row[i];
        }
        for (int k = 0; k < Cell::kStates; ++k) {
          store(carry_[k] + row * Hp_ + unit, dprev[k].row[i]);
        }
      });
    });
    for (int64_t i = active; i < count; ++i) {
      const int64_t row = first + i;
      for (int k = 0; k < Cell::kStates; ++k) {
        if (!p_.dinitial[k]) continue;
        store(at<Storage>(p_.dinitial[k], row * H_ + unit),
              k == 0 ? dh(i) : load<T>(carry_[k] + row * Hp_ + unit), lanes);
      }
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
  const int parts_;
  const Partition partition_;
  const int64_t lead_;  // rows of zeros that fill the panels up to whole groups
  const int64_t panel_rows_;
  Carver carver_;
  O* panels_;                // for each panel [panel_rows][vectors][lanes]
  T* carry_[Cell::kStates];  // [B][Hp]: what has reached each state, but for W_hh's part
  T* bias_;                  // [threads][kGrads][Hp]
  T* scratch_;               // [parts], each [panel][rows][vectors][lanes]: sums in the making
  Mask mask_;
  Barrier barrier_;
};

// ---- One step ----------------------------------------------------------------------------------

template <class Cell, class T, class Storage>
struct Step {
  using V = Vec<T>;
  static constexpr int G = Cell::kGates;
  const StepParams& p;

  void run(int member, int team) const {
    const int64_t H = p.shape.hidden;
    const Range rows = share(p.shape.batch, member, team);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      by_rows<kRowsTogether>(H / V::kLanes, [&](auto vectors, int64_t from) {
        finish<vectors>(row, from * V::kLanes, std::integral_constant<int64_t, V::kLanes>{});
      });
      const int64_t left = H % V::kLanes;
      if (left > 0) finish<1>(row, H - left, Some{left});
    }
  }

 private:
  // A few vectors of units.
  template <int kVectors, class Lanes>
  LSTMX_INLINE void finish(int64_t row, int64_t first, Lanes lanes) const {
    const int64_t H = p.shape.hidden;
    using R = Rows<T, kVectors>;
    R x[G], h[G], prev[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved];
    repeat<kVectors>([&](int i) __attribute__((always_inline)) {
      const int64_t unit = first + i * V::kLanes, gates = row * G * H + unit;
      for (int g = 0; g < G; ++g) {
        V& of_x = x[g].row[i];
        V& of_h = h[g].row[i];
        of_x = load<T>(at<T>(p.x_gates, gates + g * H), lanes);
        of_h = p.h_gates ? load<T>(at<T>(p.h_gates, gates + g * H), lanes) : V(T(0));
        if (p.b_ih) of_x = of_x + load<T>(at<Storage>(p.b_ih, g * H + unit), lanes);
        if (p.b_hh) of_h = of_h + load<T>(at<Storage>(p.b_hh, g * H + unit), lanes);
      }
      for (int k = 0; k < Cell::kStates; ++k) {
        prev[k].row[i] = load<T>(at<Storage>(p.initial[k], row * H + unit), lanes);
      }
    });
    Cell::forward(x, h, prev, next, saved);
    repeat<kVectors>([&](int i) __attribute__((always_inline)) {
      const int64_t unit = first + i * V::kLanes;
      for (int k = 0; k < Cell::kStates; ++k) {
        for (void* to : {p.states[k], p.last[k]}) {
          if (to) store(at<Storage>(to, row * H + unit), next[k].row[i], lanes);
        }
      }
      if (p.saved) {
        Storage* to = at<Storage>(p.saved, row * p.saved_row + unit);
        for (int s = 0; s < Cell::kSaved; ++s) store(to + s * H, saved[s].row[i], lanes);
      }
    });
  }
};

// ---- The table ---------------------------------------------------------------------------------

template <class Pass, class Params>
int64_t workspace_of(const Params& p, int threads) {
  return Pass(p, threads).workspace_bytes();
}

template <class Pass, class Params>
void run_pass(const Params& p, int threads) {
  Pass pass(p, threads);
  run(useful_threads(p.shape, pass.weight_bytes(), threads), pass);
}

template <class Cell, class T, class Storage, class O>
constexpr cpu::CellKernels cell_kernels() {
  using F = Forward<Cell, T, Storage, O>;
  using B = Backward<Cell, T, Storage, O>;
  return {F::fuses_input,
          workspace_of<F, SequenceForwardParams>,
          run_pass<F, SequenceForwardParams>,
          workspace_of<B, SequenceBackwardParams>,
          run_pass<B, SequenceBackwardParams>,
          [](const StepParams& p, int threads) {
            Step<Cell, T, Storage> pass{p};
            run(p.shape.batch * p.shape.hidden < 20000 ? 1 : threads, pass);
          },
          [](const SequenceShape& shape, int threads) {
            SequenceForwardParams p{};
            p.shape = shape;
            const int64_t bytes = F(p, threads).weight_bytes();
            const int team = useful_threads(shape, bytes, threads);
            return cpu::Plan{team, Partition::make(shape, bytes, team).row_parts > 1, bytes};
          }};
}

// Calls body with the way to multiply that suits the sizes.
template <class T, class O, class A, class B, class C, class Body>
void with_product(const ProductParams& p, int threads, Body&& body) {
  using Thin = ThinProduct<T, O, B, C>;
  if (Thin::fits(p)) {
    Thin pass(p, std::type_identity<A>{});
    return body(pass);
  }
  if constexpr (std::is_same_v<A, B>) {
    if (better_turned(p)) {
      const ProductParams t = turned(p);
      Product<T, O, B, A, C> pass(t, threads);
      return body(pass);
    }
  }
  Product<T, O, A, B, C> pass(p, threads);
  body(pass);
}

template <class T, class O, class A, class B, class C>
constexpr cpu::ProductKernel product_kernel() {
  return {[](const ProductParams& p, int threads) {
            int64_t bytes = 0;
            with_product<T, O, A, B, C>(p, threads,
                                        [&](auto& pass) { bytes = pass.workspace_bytes(); });
            return bytes;
          },
          [](const ProductParams& p, int threads) {
            const int team = p.m * p.n * p.k < 100000 ? 1 : threads;
            with_product<T, O, A, B, C>(p, threads, [&](auto& pass) { run(team, pass); });
          }};
}

template <class T, class Storage, class O>
constexpr cpu::Kernels all_kernels() {
  return {{cell_kernels<Lstm, T, Storage, O>(), cell_kernels<Gru, T, Storage, O>()},
          product_kernel<T, O, Storage, Storage, T>(),
          product_kernel<T, O, O, Storage, Storage>(),
          product_kernel<T, O, O, Storage, T>(),
          std::is_same_v<Storage, O>};
}

constexpr cpu::KernelTable kernel_table(const char* name) {
  cpu::KernelTable table{};
  table.name = name;
  table.by_dtype[int(DType::kFloat32)] = all_kernels<float, float, float>();
  table.by_dtype[int(DType::kFloat64)] = all_kernels<double, double, double>();
  table.by_dtype[int(DType::kBFloat16)] = all_kernels<float, PlainBFloat16, float>();
  table.by_dtype[int(DType::kFloat16)] = all_kernels<float, Float16, float>();
  // A processor that has instructions for it has the widest vectors too.
  if constexpr (LSTMX_VECTOR_BYTES == 64) table.pairs = all_kernels<float, BFloat16, BFloat16>();
  table.mask_bytes = mask_bytes;
  table.draw_mask = [](const WeightDropout& dropout, int64_t elements, uint8_t* kept, int threads) {
    DrawMask pass{MaskRule::make(*dropout.seed, dropout.p), elements, kept};
    run(elements < 40000 ? 1 : threads, pass);
  };
  table.mask_float = mask_elements<float>;
  table.mask_double = mask_elements<double>;
  return table;
}

}  // namespace lstmx::LSTMX_ISA
