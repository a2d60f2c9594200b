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

// c[kRows][kVectors] (+)= a[kRows, depth] * panel[depth][kVectors]
template <class T, int kRows, int kVectors>
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
      const V broadcast = V(a[m * lda + k]);
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

template <class T, int kVectors, int kRows = Tile<T>::max_rows(kVectors)>
LSTMX_INLINE void multiply_rows(int64_t rows, const T* a, int64_t lda, const T* panel,
                                int64_t depth, bool accumulate, T* c) {
  if (rows == kRows) {
    multiply_tile<T, kRows, kVectors>(a, lda, panel, depth, accumulate, c);
  } else if constexpr (kRows > 1) {
    multiply_rows<T, kVectors, kRows - 1>(rows, a, lda, panel, depth, accumulate, c);
  }
}

// All rows times one panel. finish(row, rows, c) is called for each tile, with the product of rows
// row, row + 1, ... in c[rows][kVectors][lanes], as soon as it is complete.
template <class T, int kVectors, class Finish>
LSTMX_INLINE void multiply_panel(const T* a, int64_t lda, Range rows, const T* panel, int64_t depth,
                                 T* scratch, Finish&& finish) {
  const int64_t count = rows.end - rows.begin;
  const int64_t tiles = (count + Tile<T>::max_rows(kVectors) - 1) / Tile<T>::max_rows(kVectors);
  // At least one, which yields zeros where there is nothing to sum.
  const int64_t blocks = std::max<int64_t>(
      1, (depth + Tile<T>::max_depth(kVectors) - 1) / Tile<T>::max_depth(kVectors));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t k = depth * block / blocks, k_end = depth * (block + 1) / blocks;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = count * tile / tiles, last = count * (tile + 1) / tiles;
      T* c = scratch + first * kVectors * Vec<T>::kLanes;
      multiply_rows<T, kVectors>(last - first, a + (rows.begin + first) * lda + k, lda,
                                 panel + k * kVectors * Vec<T>::kLanes, k_end - k, block > 0, c);
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
        row_block_(row_block(p.k)),
        depth_(p.k + 16),  // rows of a packed block must not all map to the same cache set
        panel_count_((p.n + kWidth - 1) / kWidth),
        carver_(p.workspace) {
    panels_ = carver_.take<T>(padded<T>(p.n) * p.k);
    if (!direct()) blocks_ = carver_.take<T>(threads * row_block_ * depth_);
    scratch_ = carver_.take<T>(threads * row_block_ * kWidth);
    masked_ = p.dropout.seed != nullptr && p.workspace != nullptr;
    if (masked_) rule_ = MaskRule::make(*p.dropout.seed, p.dropout.p);
  }

  int64_t workspace_bytes() const { return carver_.used(); }

  void run(int member, int team) {
    const Range mine = share(panel_count_, member, team);
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) pack(panel);
    barrier_.wait(team);

    T* block = direct() ? nullptr : blocks_ + member * row_block_ * depth_;
    T* scratch = scratch_ + member * row_block_ * kWidth;
    const Range rows = share(p_.m, member, team);
    const int64_t blocks = (rows.end - rows.begin + row_block_ - 1) / row_block_;
    for (int64_t i = 0; i < blocks; ++i) {
      const Range part = share(rows.end - rows.begin, int(i), int(blocks));
      const int64_t first = rows.begin + part.begin, count = part.end - part.begin;
      const T* a;
      int64_t lda;
      if (direct()) {
        a = at<T>(p_.a, first * p_.a_row), lda = p_.a_row;
      } else {
        pack_rows(first, count, block);
        a = block, lda = depth_;
      }
      for (int64_t panel = 0; panel < panel_count_; ++panel) {
        with_vectors(vectors(panel), [&](auto n) {
          multiply_panel<T, n>(a, lda, {0, count}, panels_ + panel * kWidth * p_.k, p_.k, scratch,
                               [&](int64_t row, int64_t tile_rows, const T* c) {
                                 finish(first + row, tile_rows, panel * kWidth, n, c);
                               });
        });
      }
    }
  }

 private:
  static int64_t row_block(int64_t k) {
    constexpr int64_t kRows = Tile<T>::max_rows(kVectors), kBytes = 1 << 20;
    const int64_t rows = kBytes / (std::max<int64_t>(k, 1) * int64_t{sizeof(T)});
    return std::clamp<int64_t>(rows / kRows, 8, 40) * kRows;
  }
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

  // to[row][k]
  void pack_rows(int64_t first, int64_t count, T* to) const {
    constexpr int64_t kStep = 16;
    const A* from = at<A>(p_.a, first * p_.a_row);
    for (int64_t k = 0; k < p_.k; k += kStep) {
      const int64_t k_end = std::min(p_.k, k + kStep);
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t kk = k; kk < k_end; ++kk) {
          to[row * depth_ + kk] = widen(from[row * p_.a_row + kk * p_.a_column]);
        }
      }
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
  const int64_t row_block_, depth_, panel_count_;
  Carver carver_;
  T* panels_;            // for each panel [k][width]
  T* blocks_ = nullptr;  // [threads][row_block][depth]: rows of a
  T* scratch_;           // [threads][row_block][width]
  bool masked_;
  MaskRule rule_;
  Barrier barrier_;
};

}  // namespace lstmx::LSTMX_ISA
