// The matrix product: its micro-kernel, which the recurrence uses too, and the products over all
// steps at once that stand before and after it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "mask.h"
#include "pass.h"
#include "vector.h"

namespace lstmx::LSTMX_ISA {

using cpu::ProductParams;

// ---- The micro-kernel --------------------------------------------------------------------------

template <class T>
struct Tile {
  static constexpr int kLanes = Vec<T>::kLanes;
  // Accumulators that leave room for a row of the panel and a broadcast.
  static constexpr int kAccumulators = LSTMX_VECTOR_REGISTERS - LSTMX_VECTOR_REGISTERS / 8 - 2;
  static constexpr int max_rows(int vectors) { return kAccumulators / vectors; }
  // Rows of a panel that stay in half of a 32 KiB first-level cache while all tiles pass over them.
  static constexpr int64_t max_depth(int vectors) {
    return 24 * 1024 / (vectors * LSTMX_VECTOR_BYTES);
  }
};

// Where a's elements lie: row m, term k at [m * lda + k], or turned at [k * lda + m].
enum class Layout { kByRows, kTurned };

template <Layout kLayout>
LSTMX_INLINE int64_t place(int64_t m, int64_t k, int64_t lda) {
  return kLayout == Layout::kByRows ? m * lda + k : k * lda + m;
}

// c[kRows][kVectors] (+)= a[kRows, depth] * panel[depth][kVectors]
template <class T, int kRows, int kVectors, Layout kLayout>
__attribute__((noinline)) void multiply_tile(const T* a, int64_t lda, const T* panel, int64_t depth,
                                             bool accumulate, T* c) {
  using V = Vec<T>;
  // Too few sums to hide the latency of a multiply-add are split in independent parts.
  constexpr int kSplit = kRows * kVectors >= 8 ? 1 : kRows * kVectors >= 4 ? 2 : 4;
  V sum[kSplit][kRows][kVectors];
#pragma GCC unroll 4
  for (int s = 0; s < kSplit; ++s) {
#pragma GCC unroll 32
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) {
        sum[s][m][n] = s == 0 && accumulate ? load<T>(c + (m * kVectors + n) * V::kLanes) : V(T(0));
      }
    }
  }
  const auto multiply_row = [&](int64_t k, int s) __attribute__((always_inline)) {
    V b[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) b[n] = load<T>(panel + (k * kVectors + n) * V::kLanes);
#pragma GCC unroll 32
    for (int m = 0; m < kRows; ++m) {
      const V broadcast = V(a[place<kLayout>(m, k, lda)]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sum[s][m][n] = broadcast * b[n] + sum[s][m][n];
    }
  };
  int64_t k = 0;
  for (; k + kSplit <= depth; k += kSplit) {
#pragma GCC unroll 4
    for (int s = 0; s < kSplit; ++s) multiply_row(k + s, s);
  }
  for (; k < depth; ++k) multiply_row(k, 0);
#pragma GCC unroll 32
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      V total = sum[0][m][n];
#pragma GCC unroll 4
      for (int s = 1; s < kSplit; ++s) total = total + sum[s][m][n];
      store(c + (m * kVectors + n) * V::kLanes, total);
    }
  }
}

template <class T, int kVectors, Layout kLayout, int kRows = Tile<T>::max_rows(kVectors)>
LSTMX_INLINE void multiply_rows(int64_t rows, const T* a, int64_t lda, const T* panel,
                                int64_t depth, bool accumulate, T* c) {
  if (rows == kRows) {
    multiply_tile<T, kRows, kVectors, kLayout>(a, lda, panel, depth, accumulate, c);
  } else if constexpr (kRows > 1) {
    multiply_rows<T, kVectors, kLayout, kRows - 1>(rows, a, lda, panel, depth, accumulate, c);
  }
}

// Many rows and columns of a and all of a panel do not fit the second-level cache together. Of a
// sum this long, parts of a few hundred terms are made for all panels, before the next part.
struct Depth {
  static constexpr int64_t kCacheBytes = 384 * 1024;

  Depth(int64_t terms, int64_t rows, int64_t element_bytes) : terms(terms) {
    const int64_t bytes = rows * terms * element_bytes;
    parts = std::max<int64_t>(1, (bytes + kCacheBytes - 1) / kCacheBytes);
  }
  Range part(int64_t i) const { return {terms * i / parts, terms * (i + 1) / parts}; }

  int64_t terms, parts;
};

// All rows times one panel, for the terms of `depth`; scratch [rows][kVectors][lanes] has the sum
// of the terms before. finish(row, rows, c) is called for each tile, with the sum so far of rows
// row, row + 1, ... in c[rows][kVectors][lanes]. Before that, fetch(row, rows, part) is called with
// each of several parts of [0, 1), to ask for a part of what finish will read and write.
template <class T, int kVectors, Layout kLayout = Layout::kByRows, class Finish>
LSTMX_INLINE void multiply_panel(const T* a, int64_t lda, Range rows, const T* panel, Range depth,
                                 T* scratch, Finish&& finish) {
  const int64_t count = rows.end - rows.begin, terms = depth.end - depth.begin;
  const int64_t tiles = (count + Tile<T>::max_rows(kVectors) - 1) / Tile<T>::max_rows(kVectors);
  // At least one, which yields zeros where there is nothing to sum.
  const int64_t blocks = std::max<int64_t>(
      1, (terms + Tile<T>::max_depth(kVectors) - 1) / Tile<T>::max_depth(kVectors));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t k = depth.begin + terms * block / blocks;
    const int64_t k_end = depth.begin + terms * (block + 1) / blocks;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = count * tile / tiles, last = count * (tile + 1) / tiles;
      T* c = scratch + first * kVectors * Vec<T>::kLanes;
      multiply_rows<T, kVectors, kLayout>(
          last - first, a + place<kLayout>(rows.begin + first, k, lda), lda,
          panel + k * kVectors * Vec<T>::kLanes, k_end - k, k > 0, c);
      if (block == blocks - 1) finish(rows.begin + first, last - first, c);
    }
  }
}

// Calls body with count, one of 1 ... 4, as a compile-time constant.
template <class Body>
LSTMX_INLINE void with_vectors(int64_t count, Body&& body) {
  switch (count) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    default:
      return body(std::integral_constant<int, 4>{});
  }
}

// ---- Whole matrices ----------------------------------------------------------------------------

// c = a b, see ProductParams. b is packed into panels of up to four vectors of columns; each member
// takes a share of the rows, in blocks that stay in its second-level cache.
template <class T, class A, class B, class C>
class Product {
 public:
  using V = Vec<T>;
  static constexpr int kVectors = 4;
  static constexpr int64_t kWidth = kVectors * V::kLanes;

  Product(const ProductParams& p, int threads)
      : p_(p),
        depth_(p.k, kRowBlock, sizeof(T)),
        lda_(p.k / depth_.parts + 17),  // packed rows must not all map to the same cache set
        panel_count_((p.n + kWidth - 1) / kWidth),
        carver_(p.workspace) {
    panels_ = carver_.take<T>(padded<T>(p.n) * p.k);
    if (!direct()) blocks_ = carver_.take<T>(threads * kRowBlock * lda_);
    scratch_ = carver_.take<T>(threads * scratch_size());
    masked_ = p.dropout.seed != nullptr && p.workspace != nullptr;
    if (masked_) rule_ = MaskRule::make(*p.dropout.seed, p.dropout.p);
  }

  int64_t workspace_bytes() const { return carver_.used(); }

  void run(int member, int team) {
    const Range mine = share(panel_count_, member, team);
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) pack(panel);
    barrier_.wait(team);

    T* block = direct() ? nullptr : blocks_ + member * kRowBlock * lda_;
    T* scratch = scratch_ + member * scratch_size();
    const Range rows = share(p_.m, member, team);
    const int64_t blocks = (rows.end - rows.begin + kRowBlock - 1) / kRowBlock;
    for (int64_t i = 0; i < blocks; ++i) {
      const Range part = share(rows.end - rows.begin, int(i), int(blocks));
      const int64_t first = rows.begin + part.begin, count = part.end - part.begin;
      for (int64_t d = 0; d < depth_.parts; ++d) {
        const Range depth = depth_.part(d);
        if (direct()) {
          multiply<Layout::kByRows>(at<T>(p_.a, first * p_.a_row), p_.a_row, first, count, d,
                                    scratch);
        } else if (p_.a_column == 1) {
          pack_rows(first, count, depth, block);
          multiply<Layout::kByRows>(block - depth.begin, lda_, first, count, d, scratch);
        } else {
          pack_turned(first, count, depth, block);
          multiply<Layout::kTurned>(block - depth.begin * kRowBlock, kRowBlock, first, count, d,
                                    scratch);
        }
      }
    }
  }

 private:
  // Rows [first, first + count) times all panels, for part d of the depth.
  template <Layout kLayout>
  void multiply(const T* a, int64_t lda, int64_t first, int64_t count, int64_t d, T* scratch) {
    for (int64_t panel = 0; panel < panel_count_; ++panel) {
      with_vectors(vectors(panel), [&](auto n) {
        multiply_panel<T, n, kLayout>(a, lda, {0, count}, panels_ + panel * kWidth * p_.k,
                                      depth_.part(d), scratch + panel * kWidth * kRowBlock,
                                      [&](int64_t row, int64_t rows, const T* c) {
                                        if (d + 1 == depth_.parts)
                                          finish(first + row, rows, panel * kWidth, n, c);
                                      });
      });
    }
  }

  // Rows that share one pass over the panels; with them a depth of some hundred fills the cache.
  static constexpr int64_t kRowBlock = 40 * Tile<T>::max_rows(kVectors);

  int64_t scratch_size() const { return panel_count_ * kWidth * kRowBlock; }
  bool direct() const { return std::is_same_v<A, T> && p_.a_column == 1; }
  int64_t vectors(int64_t panel) const {
    return std::min<int64_t>(kVectors, padded<T>(p_.n) / V::kLanes - panel * kVectors);
  }

  // panel[k][column]; a few k at a time, so that either order of b uses whole cache lines.
  void pack(int64_t panel) const {
    constexpr int64_t kStep = 16;
    const int64_t column = panel * kWidth, width = vectors(panel) * V::kLanes;
    const int64_t count = std::min(width, p_.n - column);
    for (int64_t k = 0; k < p_.k; k += kStep) {
      const int64_t k_end = std::min(p_.k, k + kStep);
      T* to = panels_ + column * p_.k;
      const B* from = at<B>(p_.b, column * p_.b_column);
      if (p_.b_column == 1) {
        for (int64_t kk = k; kk < k_end; ++kk) {
          for (int64_t n = 0; n < count; ++n) to[kk * width + n] = widen(from[kk * p_.b_row + n]);
        }
      } else {
        for (int64_t n = 0; n < count; ++n) {
          for (int64_t kk = k; kk < k_end; ++kk) {
            to[kk * width + n] = widen(from[kk * p_.b_row + n * p_.b_column]);
          }
        }
      }
      for (int64_t kk = k; kk < k_end; ++kk) {
        for (int64_t n = count; n < width; ++n) to[kk * width + n] = T(0);
      }
    }
  }

  // to[row][k - depth.begin]
  void pack_rows(int64_t first, int64_t count, Range depth, T* to) const {
    for (int64_t row = 0; row < count; ++row) {
      const A* from = at<A>(p_.a, (first + row) * p_.a_row);
      for (int64_t k = depth.begin; k < depth.end; ++k) {
        to[row * lda_ + k - depth.begin] = widen(from[k]);
      }
    }
  }

  // to[k - depth.begin][row]
  void pack_turned(int64_t first, int64_t count, Range depth, T* to) const {
    for (int64_t k = depth.begin; k < depth.end; ++k) {
      const A* from = at<A>(p_.a, k * p_.a_column + first * p_.a_row);
      if (p_.a_row == 1) {
        for (int64_t row = 0; row < count; ++row) to[row] = widen(from[row]);
      } else {
        for (int64_t row = 0; row < count; ++row) to[row] = widen(from[row * p_.a_row]);
      }
      to += kRowBlock;
    }
  }

  LSTMX_INLINE void finish(int64_t first, int64_t rows, int64_t column, int vectors,
                           const T* c) const {
    T factor[kWidth];
    const int64_t count = std::min<int64_t>(vectors * V::kLanes, p_.n - column);
    for (int64_t row = first; row < first + rows; ++row) {
      if (masked_) {
        const int64_t element = row * p_.n + column;
        mask_factors(rule_, element, element + count, factor);
      }
      for (int64_t n = 0; n < count; n += V::kLanes, c += V::kLanes) {
        const int64_t lanes = std::min<int64_t>(V::kLanes, count - n);
        V value = load<T>(c);
        if (masked_) value = value * load<T>(factor + n, lanes);
        store(at<C>(p_.c, row * p_.c_row + column + n), value, lanes);
      }
    }
  }

  const ProductParams& p_;
  const Depth depth_;
  const int64_t lda_, panel_count_;
  Carver carver_;
  T* panels_;            // for each panel [k][width]
  T* blocks_ = nullptr;  // [threads][kRowBlock][lda]: rows of a
  T* scratch_;           // [threads][panel][kRowBlock][width]
  bool masked_;
  MaskRule rule_;
  Barrier barrier_;
};

}  // namespace lstmx::LSTMX_ISA
