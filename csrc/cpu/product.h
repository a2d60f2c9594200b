// The matrix product: its micro-kernel, which the recurrence uses too, and the products over all
// steps at once that stand before and after it.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "mask.h"
#include "matrix_unit.h"
#include "pack.h"
#include "pass.h"
#include "vector.h"

namespace lstmx::LSTMX_ISA {

using cpu::ProductParams;

// ---- The micro-kernel --------------------------------------------------------------------------

constexpr int kMostVectors = 4;  // of columns in a panel

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

// Operands lie in groups, see pack.h, and a product takes a group at a time. Row m, group k of a is
// at [m * lda + k], or turned at [k * lda + m]; lda is in elements of the one, in groups of the
// other.
enum class Layout { kByRows, kTurned };

template <Layout kLayout, class O>
LSTMX_INLINE const O* place(const O* a, int64_t m, int64_t k, int64_t lda) {
  return a + (kLayout == Layout::kByRows ? m * lda + k * kGroup<O> : (k * lda + m) * kGroup<O>);
}

// sum + a b, with the group at a in all lanes.
template <class T>
LSTMX_INLINE Vec<T> broadcast(const T* a) {
  return Vec<T>(*a);
}
template <class T>
LSTMX_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> sum, const T*) {
#if LSTMX_VECTOR_BYTES == 32
  // As gcc writes it, sums move between the few registers, and what they meet is loaded twice.
  if constexpr (sizeof(T) == 4) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum.raw) : "x"(a.raw), "x"(b.raw));
  } else {
    asm("vfmadd231pd %2, %1, %0" : "+x"(sum.raw) : "x"(a.raw), "x"(b.raw));
  }
  return sum;
#else
  return a * b + sum;
#endif
}

// Pairs of bfloat16, in one instruction for which gcc 12 would have to compile the whole function
// for processors that have it. It takes subnormal numbers as zeros.
LSTMX_INLINE Vec<float> broadcast(const BFloat16* a) {
  uint32_t pair;
  std::memcpy(&pair, a, sizeof(pair));
  return (RawFloat)(pair + RawWord{});
}
LSTMX_INLINE Vec<float> multiply_add([[maybe_unused]] Vec<float> a, [[maybe_unused]] Vec<float> b,
                                     Vec<float> sum, const BFloat16*) {
#if LSTMX_VECTOR_BYTES == 64
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(b.raw), "v"(a.raw));
#endif
  return sum;
}

// What a tile fetches into the cache while it multiplies, `step` bytes for each group of its depth.
struct Ahead {
  const char* data;
  int64_t step;
};

// c[kRows][kVectors] (+)= a[kRows, depth] * panel[depth][kVectors]; the depth is in groups.
template <class T, class O, int kRows, int kVectors, Layout kLayout>
LSTMX_CALL void multiply_tile(const O* a, int64_t lda, const O* panel, int64_t depth,
                              bool accumulate, T* c, Ahead ahead) {
  using V = Vec<T>;
  // Too few sums to hide the latency of a multiply-add are split in independent parts.
  constexpr int kSplit = kRows * kVectors >= 8 ? 1 : kRows * kVectors >= 4 ? 2 : 4;
  // Groups that make one pass of the loop. A tile of sixteen registers is done with one so soon
  // that the loop itself counts.
  constexpr int kTogether = LSTMX_VECTOR_REGISTERS > 16 ? kSplit : 4;
  // With fewer rows than this, what the processor fetches by itself comes in time.
  constexpr int kFetchingRows = LSTMX_VECTOR_BYTES == 64 ? kVectors : 2;
  V sum[kSplit][kRows][kVectors];
  const auto for_each = [](auto&& body) __attribute__((always_inline)) {
    repeat<kRows>([&](int m) __attribute__((always_inline)) {
      repeat<kVectors>([&](int n) __attribute__((always_inline)) { body(m, n); });
    });
  };
  for_each([&](int m, int n) __attribute__((always_inline)) {
    repeat<kSplit>([&](int s) __attribute__((always_inline)) { sum[s][m][n] = V(T(0)); });
  });
  const auto multiply_group = [&](int64_t k, int s) __attribute__((always_inline)) {
    const auto row = [&](int m) __attribute__((always_inline)) {
      return broadcast(place<kLayout>(a, m, k, lda));
    };
    const auto column = [&](int n) __attribute__((always_inline)) {
      V b;
      std::memcpy(&b, panel + (k * kVectors + n) * V::kLanes * kGroup<O>, sizeof(V));
      return b;
    };
    const auto add = [&](int m, int n, V of_a, V of_b) __attribute__((always_inline)) {
      sum[s][m][n] = multiply_add(of_a, of_b, sum[s][m][n], a);
    };
    // The fewer of the two wait in registers for the others.
    if constexpr (kRows < kVectors) {
      V rows[kRows];
      repeat<kRows>([&](int m) __attribute__((always_inline)) { rows[m] = row(m); });
      repeat<kVectors>([&](int n) __attribute__((always_inline)) {
        const V b = column(n);
        repeat<kRows>([&](int m) __attribute__((always_inline)) { add(m, n, rows[m], b); });
      });
    } else {
      V columns[kVectors];
      repeat<kVectors>([&](int n) __attribute__((always_inline)) { columns[n] = column(n); });
      repeat<kRows>([&](int m) __attribute__((always_inline)) {
        const V b = row(m);
        repeat<kVectors>([&](int n) __attribute__((always_inline)) { add(m, n, b, columns[n]); });
      });
    }
  };
  int64_t k = 0;
  for (; k + kTogether <= depth; k += kTogether) {
    if constexpr (kRows >= kFetchingRows) {
      const char* lines = ahead.data + k * ahead.step;
      for (int64_t i = 0; i < kTogether * ahead.step; i += 64) __builtin_prefetch(lines + i);
    }
    repeat<kTogether>([&](int i)
                          __attribute__((always_inline)) { multiply_group(k + i, i % kSplit); });
  }
  for (; k < depth; ++k) multiply_group(k, 0);
  for_each([&](int m, int n) __attribute__((always_inline)) {
    V total = sum[0][m][n];
    for (int s = 1; s < kSplit; ++s) total = total + sum[s][m][n];
    T* to = c + (m * kVectors + n) * V::kLanes;
    store(to, accumulate ? load<T>(to) + total : total);
  });
}

template <class T, class O>
using TileKernel = void (*)(const O* a, int64_t lda, const O* panel, int64_t depth, bool accumulate,
                            T* c, Ahead ahead);

// Those of 1, 2, ... rows.
template <class T, class O, Layout kLayout, int kVectors, int... kRow>
constexpr auto tile_kernels(std::integer_sequence<int, kRow...>) {
  return std::array<TileKernel<T, O>, Tile<T>::max_rows(1)>{
      multiply_tile<T, O, kRow + 1, kVectors, kLayout>...};
}
template <class T, class O, Layout kLayout, int... kVector>
constexpr auto tile_kernels_by_vectors(std::integer_sequence<int, kVector...>) {
  return std::array{tile_kernels<T, O, kLayout, kVector + 1>(
      std::make_integer_sequence<int, Tile<T>::max_rows(kVector + 1)>{})...};
}
// [vectors - 1][rows - 1]
template <class T, class O, Layout kLayout>
constexpr auto kTileKernels =
    tile_kernels_by_vectors<T, O, kLayout>(std::make_integer_sequence<int, kMostVectors>{});

// Many rows and columns of a and all of a panel do not fit the second-level cache together. Of a
// sum this long, parts of a few hundred terms are made for all panels, before the next part.
struct Depth {
  static constexpr int64_t kCacheBytes = 384 * 1024;

  // Parts are multiples of `step`, but for the last.
  Depth(int64_t terms, int64_t rows, int64_t element_bytes, int64_t step) : terms(terms) {
    const int64_t bytes = rows * terms * element_bytes;
    const int64_t count = std::max<int64_t>(1, (bytes + kCacheBytes - 1) / kCacheBytes);
    length = std::max<int64_t>(1, ((terms + count - 1) / count + step - 1) / step) * step;
    parts = std::max<int64_t>(1, (terms + length - 1) / length);
  }
  Range part(int64_t i) const { return {length * i, std::min(terms, length * (i + 1))}; }

  int64_t terms, length, parts;
};

template <class O>
LSTMX_INLINE bool by_unit() {
  return kGroup<O> > 1 && cpu::matrix_unit.multiply;
}

// Terms that go together.
template <class O>
LSTMX_INLINE int64_t depth_step() {
  return by_unit<O>() ? cpu::kUnitTerms : kGroup<O>;
}

// The panel whose turn is next. One that is near comes by itself in time, see comes_by_itself; the
// matrix unit would only fetch it twice.
template <class O>
struct Next {
  const O* panel;
  bool near;
};

constexpr int64_t kUnitRows = 128;  // whose sums stay near while the unit makes them

// All rows times one panel, for the terms of `depth`; scratch [rows][vectors][lanes] has the sum
// of the terms before. finish(row, rows, c) is called for each tile, with the sum so far of rows
// row, row + 1, ... in c[rows][vectors][lanes]. Panels come from far away, and unless fetched
// ahead, the first tile would wait for each block of them. So does what finish meets: fetch(row,
// rows) fetches it while those rows are multiplied for the last time; the matrix unit, which is
// faster, begins with the first.
template <class T, Layout kLayout = Layout::kByRows, class O, class Fetch, class Finish>
LSTMX_INLINE void multiply_panel(int vectors, const O* a, int64_t lda, Range rows, const O* panel,
                                 Next<O> next, Range depth, T* scratch, Fetch&& fetch,
                                 Finish&& finish) {
  const int64_t width = vectors * Vec<T>::kLanes;
  const int64_t count = rows.end - rows.begin;
  if constexpr (kGroup<O> > 1 && kLayout == Layout::kByRows) {
    if (by_unit<O>()) {
      const int groups = int((count + kUnitRows - 1) / kUnitRows);
      const int64_t steps = (depth.end - depth.begin + cpu::kUnitTerms - 1) / cpu::kUnitTerms;
      const int blocks =
          steps <= cpu::kAllUnitSteps ? 1 : int((steps + cpu::kUnitSteps - 1) / cpu::kUnitSteps);
      const auto terms = [&](int block) {
        const Range part = share(steps, block, blocks);
        return Range{depth.begin + part.begin * cpu::kUnitTerms,
                     std::min(depth.end, depth.begin + part.end * cpu::kUnitTerms)};
      };
      for (int group = 0; group < groups; ++group) {
        const Range part = share(count, group, groups);
        const int64_t first = rows.begin + part.begin, mine = part.end - part.begin;
        T* c = scratch + part.begin * width;
        for (int block = 0; block < blocks; ++block) {
          const Range met = share(mine, block, blocks), k = terms(block);
          fetch(first + met.begin, met.end - met.begin);
          const O* following = next.near            ? nullptr
                               : block + 1 < blocks ? panel + k.end * width
                               : group + 1 < groups ? panel + depth.begin * width
                                                    : next.panel + depth.begin * width;
          cpu::matrix_unit.multiply(mine, width, k.end - k.begin, a + first * lda + k.begin, lda,
                                    panel + k.begin * width, following, k.begin > 0, c);
        }
        finish(first, mine, c);
      }
      return;
    }
  }
  const int64_t begin = depth.begin / kGroup<O>, terms = (depth.end - depth.begin) / kGroup<O>;
  const int max_rows = Tile<T>::max_rows(vectors);
  const int64_t tiles = (count + max_rows - 1) / max_rows;
  if (tiles == 0) return;
  // At least one, which yields zeros where there is nothing to sum.
  const int64_t blocks =
      std::max<int64_t>(1, (terms + Tile<T>::max_depth(vectors) - 1) / Tile<T>::max_depth(vectors));
  // No division from here on: one takes as long as several terms of a tile. The first tiles have a
  // row more, and the first blocks a term; each tile fetches its share of the next block.
  const int64_t tile_rows = count / tiles, taller = count % tiles;
  const int64_t block_terms = terms / blocks, deeper = terms % blocks;
  // Bytes for each term. Vectors of 32 bytes do not outrun the second-level cache.
  const bool fetches = LSTMX_VECTOR_BYTES == 64 || !next.near;
  const int64_t ahead = fetches ? width * kGroup<O> * sizeof(O) / tiles : 0;
  int64_t k = begin;
  for (int64_t block = 0; block < blocks; ++block) {
    const bool last = block == blocks - 1;
    const int64_t length = block_terms + (block < deeper);
    const char* following = reinterpret_cast<const char*>(
        last ? next.panel + depth.begin * width : panel + (k + length) * width * kGroup<O>);
    int64_t row = rows.begin;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t mine = tile_rows + (tile < taller);
      T* c = scratch + (row - rows.begin) * width;
      if (last) fetch(row, mine);
      kTileKernels<T, O, kLayout>[vectors - 1][mine - 1](place<kLayout>(a, row, k, lda), lda,
                                                         panel + k* width* kGroup<O>, length, k > 0,
                                                         c, {following, ahead});
      if (last) finish(row, mine, c);
      following += ahead * length;
      row += mine;
    }
    k += length;
  }
}

// A member's products are over.
template <class O>
LSTMX_INLINE void release_unit() {
  if (by_unit<O>()) cpu::matrix_unit.release();
}

// ---- Whole matrices ----------------------------------------------------------------------------

// c = a b, see ProductParams. b is packed into panels of up to four vectors of columns; each member
// takes a share of the rows, in blocks that stay in its second-level cache. O is what a and b are
// multiplied as.
template <class T, class O, class A, class B, class C>
class Product {
 public:
  using V = Vec<T>;
  static constexpr int64_t kWidth = kMostVectors * V::kLanes;

  Product(const ProductParams& p, int threads)
      : p_(p),
        direct_(std::is_same_v<A, O> && p.k > 0 &&
                (p.a_column == 1 ? grouped<O>(p.k) == p.k : kGroup<O> == 1)),
        terms_(direct_ ? p.k : whole_steps(p.k)),
        depth_(terms_, kRowBlock, sizeof(O), depth_step<O>()),
        // Packed rows must not all map to the same cache set; the unit wants them aligned.
        lda_(grouped<O>(depth_.length) + (by_unit<O>() ? cpu::kUnitTerms : 17 * kGroup<O>)),
        panel_count_((p.n + kWidth - 1) / kWidth),
        parts_(p.m * p.n * p.k < 100000 ? 1 : threads),
        group_(panels_at_once(threads)),
        carver_(p.workspace) {
    panels_ = carver_.take<O>(std::min(group_ * kWidth, padded<T>(p.n)) * panel_rows<O>(terms_));
    if (!direct_) blocks_ = carver_.take<O>(threads * block_size());
    scratch_ = carver_.take<T>(threads * scratch_size());
    mask_ = Mask::make(p.dropout);
  }

  int64_t workspace_bytes() const { return carver_.used(); }

  void run(int member, int team) {
    for (int64_t first = 0; first < panel_count_; first += group_) {
      const Range group = {first, std::min(first + group_, panel_count_)};
      const Range mine = share(group.end - group.begin, member, team);
      if (first > 0) barrier_.wait(team);
      for (int64_t i = mine.begin; i < mine.end; ++i) pack(first + i, panel_at(i));
      barrier_.wait(team);
      multiply_group(group, member, team);
    }
    release_unit<O>();
  }

 private:
  // All rows times the panels of a group, which are packed.
  void multiply_group(Range group, int member, int team) {
    O* block = direct_ ? nullptr : blocks_ + member * block_size();
    T* scratch = scratch_ + member * scratch_size();
    for (int part = member; part < parts_; part += team) {
      const Range rows = share(p_.m, part, parts_);
      const int64_t blocks = std::min(part_blocks(), rows.end - rows.begin);
      for (int64_t i = 0; i < blocks; ++i) {
        const Range in_part = share(rows.end - rows.begin, int(i), int(blocks));
        const int64_t first = rows.begin + in_part.begin, count = in_part.end - in_part.begin;
        for (int64_t d = 0; d < depth_.parts; ++d) {
          multiply_block(group, first, count, d, block, scratch);
        }
      }
    }
  }

  // The same for a block of rows, of which part d is packed first if need be.
  void multiply_block(Range group, int64_t first, int64_t count, int64_t d, O* block, T* scratch) {
    const Range depth = depth_.part(d);
    const int64_t known = std::min(p_.k, depth.end) - depth.begin;
    if (direct_ && p_.a_column == 1) {
      multiply<Layout::kByRows>(group, at<O>(p_.a, first * p_.a_row), p_.a_row, first, count, d,
                                scratch);
    } else if (direct_) {
      multiply<Layout::kTurned>(group, at<O>(p_.a, first), p_.a_column, first, count, d, scratch);
    } else if (p_.a_column == 1) {
      pack_rows(first, count, depth, block);
      multiply<Layout::kByRows>(group, block - depth.begin, lda_, first, count, d, scratch);
    } else if (by_unit<O>()) {
      if constexpr (kGroup<O> > 1) {
        turn_rows(at<A>(p_.a, depth.begin * p_.a_column + first), p_.a_column, count, known,
                  depth.end - depth.begin, block, lda_);
      }
      multiply<Layout::kByRows>(group, block - depth.begin, lda_, first, count, d, scratch);
    } else {
      const int64_t lda = padded<T>(count);
      pack_straight<kRowBlock + V::kLanes>(at<A>(p_.a, depth.begin * p_.a_column + first),
                                           p_.a_column, count, known, 0, 0, Mask{}, 0, lda, block);
      multiply<Layout::kTurned>(group, block - depth.begin * lda, lda, first, count, d, scratch);
    }
  }

  // Rows [first, first + count) times the group's panels, for part d of the depth.
  template <Layout kLayout>
  void multiply(Range group, const O* a, int64_t lda, int64_t first, int64_t count, int64_t d,
                T* scratch) {
    const bool last = d + 1 == depth_.parts;
    for (int64_t i = 0; i < group.end - group.begin; ++i) {
      const int64_t panel = group.begin + i;
      T* sums = scratch + (depth_.parts > 1 ? i : 0) * kWidth * block_rows();
      const int n = vectors(panel);
      multiply_panel<T, kLayout>(
          n, a, lda, {0, count}, const_cast<const O*>(panel_at(i)),
          Next<O>{panel_at((i + 1) % (group.end - group.begin)), false}, depth_.part(d), sums,
          [&](int64_t row, int64_t rows) {
            if (last && !p_.c_turned) fetch(first + row, rows, panel * kWidth, n);
            fetch_next<kLayout>(a, lda, count, row, rows, d, i, group.end - group.begin);
          },
          [&](int64_t row, int64_t rows, const T* c) {
            if (last && !p_.c_turned) finish(first + row, rows, panel * kWidth, n, c);
          });
      if (last && p_.c_turned) finish_turned(first, count, panel * kWidth, n, sums);
    }
  }

  static constexpr int64_t kBytesAtOnce = int64_t{4} << 20;  // of packed panels and sums
  // Rows that share one pass over the panels; with them a depth of some hundred fills the cache.
  static constexpr int64_t kRowBlock = 40 * Tile<T>::max_rows(kMostVectors);

  // The unit's sums have terms, if only zeros.
  static int64_t whole_steps(int64_t k) {
    const int64_t step = depth_step<O>();
    return std::max<int64_t>(by_unit<O>(), (k + step - 1) / step) * step;
  }
  int64_t block_size() const { return (block_rows() + V::kLanes) * lda_; }
  // Sums that are not done by the first part wait for the next.
  int64_t scratch_size() const { return (depth_.parts > 1 ? group_ : 1) * kWidth * block_rows(); }
  // Of the largest part; all are of as many blocks, or none would bound the rows of each.
  int64_t part_rows() const { return (p_.m + parts_ - 1) / parts_; }
  int64_t part_blocks() const { return (part_rows() + kRowBlock - 1) / kRowBlock; }
  int64_t block_rows() const {
    const int64_t blocks = std::max<int64_t>(1, part_blocks());
    return (part_rows() + blocks - 1) / blocks;
  }
  O* panel_at(int64_t i) const { return panels_ + i * kWidth * panel_rows<O>(terms_); }
  // All, if rows of a are packed for them; else as many as make a few MB, with sums that wait.
  int64_t panels_at_once(int threads) const {
    if (!direct_) return panel_count_;
    const int64_t waiting = depth_.parts > 1 ? threads * block_rows() * int64_t{sizeof(T)} : 0;
    const int64_t bytes = kWidth * (terms_ * int64_t{sizeof(O)} + waiting);
    const int64_t most = std::max<int64_t>(1, kBytesAtOnce / bytes);
    const int64_t groups = std::max<int64_t>(1, (panel_count_ + most - 1) / most);
    return (panel_count_ + groups - 1) / groups;
  }
  int vectors(int64_t panel) const {
    return int(std::min<int64_t>(kMostVectors, padded<T>(p_.n) / V::kLanes - panel * kMostVectors));
  }

  // See pack.h. All columns of a panel lie side by side, or all its rows.
  void pack(int64_t panel, O* to) const {
    const int64_t column = panel * kWidth, width = vectors(panel) * V::kLanes;
    const int64_t count = std::min(width, p_.n - column);
    const B* from = at<B>(p_.b, column * p_.b_column);
    if (p_.b_column == 1) {
      pack_straight<kWidth>(from, p_.b_row, count, p_.k, 0, p_.b_rotation, Mask{}, 0, width, to);
    } else {
      for (int64_t n = 0; n < width; n += V::kLanes) {
        pack_turned(from + n * p_.b_column, p_.b_column, count - n, p_.k, Mask{}, 0, width,
                    to + n * kGroup<O>);
      }
    }
    std::fill(to + grouped<O>(p_.k) * width, to + panel_rows<O>(terms_) * width, O{});
  }

  // to[row][k - depth.begin]
  void pack_rows(int64_t first, int64_t count, Range depth, O* to) const {
    const int64_t known = std::min(p_.k, depth.end) - depth.begin;
    for (int64_t row = 0; row < count; ++row) {
      copy_run(at<A>(p_.a, (first + row) * p_.a_row + depth.begin), known, depth.end - depth.begin,
               Mask{}, 0, to + row * lda_);
    }
  }

  // Of what comes after rows [0, count) and part d of the depth, the share of panel i of `panels`
  // in rows [row, row + rows).
  template <Layout kLayout>
  LSTMX_INLINE void fetch_next(const O* a, int64_t lda, int64_t count, int64_t row, int64_t rows,
                               int64_t d, int64_t i, int64_t panels) const {
    if (!direct_) return;  // packing has its own pace
    const bool last = d + 1 == depth_.parts;
    const Range depth = depth_.part(last ? 0 : d + 1);
    const O* next = place<kLayout>(a, last ? count : 0, depth.begin / kGroup<O>, lda);
    if constexpr (kLayout == Layout::kByRows) {
      for (int64_t r = row; r < row + rows; ++r) {
        if (r % panels == i) fetch_run(next + r * lda, depth_.length);
      }
    } else {
      const int64_t terms = depth.end - depth.begin, before = i * count + row;
      const int64_t end = terms * (before + rows) / (panels * count);
      for (int64_t k = terms * before / (panels * count); k < end; ++k) {
        fetch_run(next + k * lda, count);
      }
    }
  }

  // c itself, where finish will come.
  LSTMX_INLINE void fetch(int64_t first, int64_t rows, int64_t column, int vectors) const {
    for (int64_t row = first; row < first + rows; ++row) {
      fetch_run(at<C>(p_.c, rotated(row, p_.c_rotation, p_.m) * p_.c_row + column),
                vectors * V::kLanes);
    }
  }

  LSTMX_CALL void finish(int64_t first, int64_t rows, int64_t column, int vectors,
                         const T* c) const {
    const V scale(static_cast<T>(mask_.scale));
    const int64_t count = std::min<int64_t>(vectors * V::kLanes, p_.n - column);
    for (int64_t row = first; row < first + rows; ++row, c += vectors * V::kLanes) {
      const int64_t to = rotated(row, p_.c_rotation, p_.m);
      for (int64_t n = 0; n < count; n += V::kLanes) {
        with_lanes<T>(count - n, [&](auto lanes) {
          V value = load<T>(c + n);
          C* sum = at<C>(p_.c, to * p_.c_row + column + n);
          if (p_.accumulate) value = value + load<T>(sum, lanes);
          if (mask_.kept) {
            value = value * (kept_lanes<T>(mask_.kept, to * p_.n + column + n) * scale);
          }
          store(sum, value, lanes);
        });
      }
    }
  }

  // All rows of a block at once, c[rows][vectors][lanes].
  void finish_turned(int64_t first, int64_t rows, int64_t column, int vectors, const T* c) const {
    Square<T> square;
    for (int64_t n = 0; n < vectors * V::kLanes && column + n < p_.n; n += V::kLanes) {
      const int64_t columns = std::min<int64_t>(V::kLanes, p_.n - column - n);
      for (int64_t row = 0; row < rows; row += V::kLanes) {
        const int64_t count = std::min<int64_t>(V::kLanes, rows - row);
        for (int64_t i = 0; i < count; ++i) {
          store(square.rows[i], load<T>(c + (row + i) * vectors * V::kLanes + n));
        }
        square.transpose();
        for (int64_t j = 0; j < columns; ++j) {
          store(at<C>(p_.c, (column + n + j) * p_.c_row + first + row), load<T>(square.rows[j]),
                count);
        }
      }
    }
  }

  const ProductParams& p_;
  const bool direct_;  // a is read where it lies, by rows or turned
  const int64_t terms_;
  const Depth depth_;
  const int64_t lda_, panel_count_;
  const int parts_;  // of the rows, whatever the size of the team
  const int64_t group_;
  Carver carver_;
  O* panels_;            // for each panel of a group [k][width]
  O* blocks_ = nullptr;  // [threads][block rows][lda]: rows of a, or turned
  T* scratch_;           // [threads], for one panel or all of a group [block rows][width]
  Mask mask_;
  Barrier barrier_;
};

// c^T = b^T a^T, for few rows and a b that would have to be turned to be packed: its own rows are
// read where they lie.
inline ProductParams turned(const ProductParams& p) {
  ProductParams t = p;
  t.m = p.n, t.n = p.m;
  t.a = p.b, t.a_row = p.b_column, t.a_column = p.b_row;
  t.b = p.a, t.b_row = p.a_column, t.b_column = p.a_row;
  t.c_turned = true;
  return t;
}
inline bool better_turned(const ProductParams& p) {
  return p.m <= 128 && p.m < p.n && p.a_column == 1 && p.b_row == 1 && p.b_column > 1 &&
         !p.dropout.kept && p.c_rotation == 0 && !p.accumulate;
}

// With so few rows, or so few terms, that packing b does not pay: it is read where it lies.
template <class T, class O, class B, class C>
class ThinProduct {
 public:
  using V = Vec<T>;
  static constexpr int64_t kThin = 16, kDotTerms = V::kLanes * kGroup<O>;
  static constexpr int kRows = 4, kColumns = 4;  // of a tile; columns are vectors
  // Or rows of W: the more streams from memory, the better, as long as there are registers for the
  // sums.
  static constexpr int dot_columns(int rows) {
    return int(std::bit_floor(unsigned(std::min(8, LSTMX_VECTOR_REGISTERS / 2 / rows))));
  }

  static bool fits(const ProductParams& p) {
    const bool thin = p.m < kThin || (p.k < kThin && p.b_column == 1);
    return thin && !p.dropout.kept && !p.accumulate;
  }

  // A is the type of a's elements.
  template <class A>
  ThinProduct(const ProductParams& p, std::type_identity<A>)
      : p_(p),
        turned_(p.b_column != 1),
        lda_(turned_ ? (p.k + kDotTerms - 1) / kDotTerms * kDotTerms : p.k),
        carver_(p.workspace) {
    if (turned_) {
      rows_ = carver_.take<O>(p.m * lda_);
      if (p.workspace) copy<A>(rows_);
    } else {
      a_ = carver_.take<T>(p.m * lda_);
      if (p.workspace) copy<A>(a_);
    }
  }

  int64_t workspace_bytes() const { return carver_.used(); }

  void run(int member, int team) {
    const int64_t width = turned_ ? dot_columns(1) : kColumns * V::kLanes;
    const Range mine = share((p_.n + width - 1) / width, member, team);
    for (int64_t tile = mine.begin; tile < mine.end; ++tile) {
      for (int64_t m = 0; m < p_.m; m += kRows) {
        with_rows(p_.m - m, [&](auto rows) {
          if (turned_) {
            for (int64_t n = 0; n < width; n += dot_columns(rows)) dot<rows>(m, tile * width + n);
          } else {
            sweep<rows>(m, tile * width);
          }
        });
      }
    }
  }

 private:
  // Calls body with how many rows a tile has, as a compile-time constant.
  template <class Body>
  LSTMX_INLINE static void with_rows(int64_t left, Body&& body) {
    switch (left) {
      case 1:
        return body(std::integral_constant<int, 1>{});
      case 2:
        return body(std::integral_constant<int, 2>{});
      case 3:
        return body(std::integral_constant<int, 3>{});
      default:
        return body(std::integral_constant<int, kRows>{});
    }
  }

  // Rows m, m + 1, ... times the vectors from column n on: b's rows are read side by side.
  template <int kCount>
  void sweep(int64_t m, int64_t n) const {
    // lanes: of each vector, as many as exist.
    const auto tile = [&](auto... lanes) __attribute__((always_inline)) {
      V sum[kCount][kColumns];
      repeat<kCount>([&](int i) __attribute__((always_inline)) {
        repeat<kColumns>([&](int v) __attribute__((always_inline)) { sum[i][v] = V(T(0)); });
      });
      for (int64_t k = 0; k < p_.k; ++k) {
        const B* b = at<B>(p_.b, rotated(k, p_.b_rotation, p_.k) * p_.b_row + n);
        int v = 0;
        const auto add = [&](int64_t count) __attribute__((always_inline)) {
          if (count > 0) {
            const V values = load<T>(b + v * V::kLanes, count);
            repeat<kCount>([&](int i) __attribute__((always_inline)) {
              sum[i][v] = V(a_[(m + i) * lda_ + k]) * values + sum[i][v];
            });
          }
          ++v;
        };
        (add(lanes), ...);
      }
      repeat<kCount>([&](int i) __attribute__((always_inline)) {
        C* c = at<C>(p_.c, rotated(m + i, p_.c_rotation, p_.m) * p_.c_row + n);
        int v = 0;
        const auto put = [&](int64_t count) __attribute__((always_inline)) {
          if (count > 0) store(c + v * V::kLanes, sum[i][v], count);
          ++v;
        };
        (put(lanes), ...);
      });
    };
    constexpr int64_t kAll = V::kLanes;
    const auto left = [&](int v) { return std::clamp<int64_t>(p_.n - n - v * kAll, 0, kAll); };
    if (p_.n - n >= kColumns * kAll) {
      tile(kAll, kAll, kAll, kAll);
    } else {
      tile(left(0), left(1), left(2), left(3));
    }
  }

  template <class A, class To>
  void copy(To* to) const {
    for (int64_t m = 0; m < p_.m; ++m, to += lda_) {
      for (int64_t k = 0; k < p_.k; ++k) {
        const A& from = *at<A>(p_.a, m * p_.a_row + k * p_.a_column);
        if constexpr (std::is_same_v<A, To>) {
          to[k] = from;
        } else {
          to[k] = widen(from);
        }
      }
      std::fill(to + p_.k, to + lda_, To{});
    }
  }

  // The next terms of a dot product: one for each lane, or a pair; zeros past the last.
  LSTMX_INLINE static V terms(const B* from, int64_t left) {
    if constexpr (kGroup<O> == 1) {
      return load<T>(from, std::min<int64_t>(left, V::kLanes));
    } else {
      B some[kDotTerms] = {};
      if (left < kDotTerms) from = std::copy_n(from, left, some) - left;
      V values;
      std::memcpy(&values, from, sizeof(values));
      return values;
    }
  }

  // Rows m, m + 1, ... times columns n, n + 1, ..., whose elements lie side by side.
  template <int kCount>
  void dot(int64_t m, int64_t n) const {
    constexpr int kColumns = dot_columns(kCount);
    const int64_t columns = std::min<int64_t>(kColumns, p_.n - n);
    if (columns <= 0) return;
    V sum[kCount][kColumns];
    repeat<kCount>([&](int i) __attribute__((always_inline)) {
      repeat<kColumns>([&](int j) __attribute__((always_inline)) { sum[i][j] = V(T(0)); });
    });
    const auto add = [&](int64_t k, int64_t left) __attribute__((always_inline)) {
      V row[kCount];
      repeat<kCount>([&](int i) __attribute__((always_inline)) {
        std::memcpy(&row[i], rows_ + (m + i) * lda_ + k, sizeof(V));
      });
      repeat<kColumns>([&](int j) __attribute__((always_inline)) {
        // Columns that do not exist repeat the last one.
        const int64_t column = n + std::min<int64_t>(j, columns - 1);
        const B* b = at<B>(p_.b, column * p_.b_column + k);
        __builtin_prefetch(b + kColumns * p_.b_column);  // the next tile's
        const V values = terms(b, left);
        repeat<kCount>([&](int i) __attribute__((always_inline)) {
          sum[i][j] = multiply_add(row[i], values, sum[i][j], rows_);
        });
      });
    };
    int64_t k = 0;
    for (; k + kDotTerms <= p_.k; k += kDotTerms) add(k, kDotTerms);
    if (k < p_.k) add(k, p_.k - k);
    repeat<kCount>([&](int i) __attribute__((always_inline)) {
      C* c = at<C>(p_.c, rotated(m + i, p_.c_rotation, p_.m) * p_.c_row + n);
      repeat<kColumns>([&](int j) __attribute__((always_inline)) {
        if (j < columns) narrow(total(sum[i][j]), c[j]);
      });
    });
  }

  static T total(V v) {
    return folded<V::kLanes / 2>(v.raw, std::make_integer_sequence<int, V::kLanes>{})[0];
  }
  // Each lane plus the one kHalf away, and so on with half of it.
  template <int kHalf, int... kLane>
  LSTMX_INLINE static auto folded(typename V::Raw v, std::integer_sequence<int, kLane...> lanes) {
    if constexpr (kHalf == 0) {
      return v;
    } else {
      return folded<kHalf / 2>(v + __builtin_shufflevector(v, v, (kLane ^ kHalf)...), lanes);
    }
  }

  const ProductParams& p_;
  const bool turned_;  // b's columns lie side by side
  const int64_t lda_;
  Carver carver_;
  T* a_ = nullptr;     // [m][lda]: a
  O* rows_ = nullptr;  // the same for dot products, with zeros up to whole vectors
};

}  // namespace lstmx::LSTMX_ISA
