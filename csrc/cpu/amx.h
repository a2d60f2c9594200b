// The matrix unit of x86 processors, AMX (Intel 64 Software Developer's Manual, volume 1, chapter
// 18). It has eight tiles, registers of up to 16 rows of 64 bytes; one instruction adds to a tile
// of 16 x 16 sums the product of 16 x 32 numbers of a and 32 x 16 of b.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "half.h"
#include "matrix_unit.h"
#include "pass.h"
#include "vector.h"

namespace lstmx::LSTMX_ISA::amx {

constexpr int kRows = 16, kColumns = 16, kTerms = cpu::kUnitTerms;
// Tiles 0 ... 3 hold sums, 4 and 5 parts of a, 6 and 7 parts of b.
constexpr int kA = 4, kB = 6;

// By hand, as gcc's intrinsics take numbers of tiles as literals only, and would want the whole
// file to be compiled for such processors.
template <int kTile>
LSTMX_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
LSTMX_INLINE void load(const void* from, int64_t bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(bytes) : "memory");
}
template <int kTile>
LSTMX_INLINE void store(void* to, int64_t bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(bytes) : "memory");
}
template <int kSum, int kLeft, int kRight>
LSTMX_INLINE void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

// Rows of the tiles of sums and of a, as this thread has set them; 0: not at all. Another number
// takes about 50 ns.
inline thread_local int configured_rows = 0;

inline void configure(int rows) {
  if (configured_rows == rows) return;
  struct {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } of;
  for (int tile = 0; tile < 8; ++tile) {
    of.row_bytes[tile] = 64;
    of.rows[tile] = static_cast<uint8_t>(tile < kB ? rows : kTerms / 2);
  }
  asm volatile("ldtilecfg %0" ::"m"(of));
  configured_rows = rows;
}

inline void release() {
  if (configured_rows > 0) asm volatile("tilerelease");
  configured_rows = 0;
}

// The last terms of a's rows, where fewer than kTerms are left: copied, and zeros after them.
struct Rest {
  void copy(const BFloat16* a, int64_t lda, int64_t count, int tile_rows) {
    const __mmask32 mask = (uint32_t{1} << count) - 1;
    for (int m = 0; m < tile_rows; ++m) {
      _mm512_store_si512(rows[m], _mm512_maskz_loadu_epi16(mask, a + m * lda));
    }
  }
  alignas(64) BFloat16 rows[kRows][kTerms];
};

// What a block of products has in common.
struct Block {
  int64_t lda, steps;  // of a: full steps of kTerms; a Rest may follow
  const BFloat16* b;
  int64_t width;  // of b and c
  bool accumulate;
  int64_t ahead_lines;  // that are fetched into the second-level cache in each step
};

// c[kTall tiles][kWide tiles] (+)= a[kTall tiles, all terms of the block] b.
template <int kTall, int kWide>
void multiply_tiles(const Block& block, const BFloat16* const (&a)[2], const Rest* rest,
                    int64_t column, const char* ahead, float* const (&c)[2]) {
  const int64_t c_bytes = block.width * int64_t{sizeof(float)}, b_bytes = block.width * 4;
  const auto for_sums = [&](auto&& body) __attribute__((always_inline)) {
    // The index of a tile must be a constant.
    const auto row = [&]<int kRow>(
                         std::integral_constant<int, kRow>) __attribute__((always_inline)) {
      float* to = c[kRow] + column;
      [&]<int... kColumn>(std::integer_sequence<int, kColumn...>) __attribute__((always_inline)) {
        (body(std::integral_constant<int, kRow * kWide + kColumn>{}, to + kColumn * kColumns), ...);
      }(std::make_integer_sequence<int, kWide>{});
    };
    row(std::integral_constant<int, 0>{});
    if constexpr (kTall > 1) row(std::integral_constant<int, 1>{});
  };
  const auto add = [&](const void* a0, const void* a1, int64_t a_bytes,
                       const BFloat16* b) __attribute__((always_inline)) {
    load<kA>(a0, a_bytes);
    if constexpr (kTall > 1) load<kA + 1>(a1, a_bytes);
    [&]<int... kColumn>(std::integer_sequence<int, kColumn...>) __attribute__((always_inline)) {
      ((load<kB + kColumn % 2>(b + kColumn * 2 * kColumns, b_bytes),
        multiply_add<kColumn, kA, kB + kColumn % 2>(),
        kTall > 1 ? multiply_add<(kTall - 1) * kWide + kColumn, kA + kTall - 1, kB + kColumn % 2>()
                  : void()),
       ...);
    }(std::make_integer_sequence<int, kWide>{});
  };

  for_sums([&](auto tile, float* from) __attribute__((always_inline)) {
    if (block.accumulate) {
      load<tile>(from, c_bytes);
    } else {
      zero<tile>();
    }
  });
  const BFloat16* b = block.b + 2 * column;
  for (int64_t step = 0; step < block.steps; ++step, b += kTerms * block.width) {
    add(a[0] + step * kTerms, a[1] + step * kTerms, block.lda * 2, b);
    for (int64_t line = 0; line < block.ahead_lines; ++line, ahead += 64) {
      __builtin_prefetch(ahead, 0, 2);
    }
  }
  if (rest) add(rest[0].rows, rest[1].rows, 64, b);
  for_sums([&](auto tile, float* to) __attribute__((always_inline)) { store<tile>(to, c_bytes); });
}

// All columns: two tiles at once for two of rows, else up to four.
template <int kTall>
void multiply_tile_rows(const Block& block, const BFloat16* const (&a)[2], const Rest* rest,
                        const char*& ahead, float* const (&c)[2]) {
  constexpr int kWide = 4 / kTall;
  for (int64_t column = 0; column < block.width; column += kWide * kColumns) {
    switch (std::min<int64_t>(kWide, (block.width - column) / kColumns)) {
      case 1:
        multiply_tiles<kTall, 1>(block, a, rest, column, ahead, c);
        break;
      case 2:
        multiply_tiles<kTall, 2>(block, a, rest, column, ahead, c);
        break;
      case 3:
        if constexpr (kWide > 2) multiply_tiles<kTall, 3>(block, a, rest, column, ahead, c);
        break;
      default:
        if constexpr (kWide > 2) multiply_tiles<kTall, 4>(block, a, rest, column, ahead, c);
    }
    ahead += block.steps * block.ahead_lines * 64;
  }
}

// See MatrixUnit.
inline void multiply(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda,
                     const BFloat16* b, const BFloat16* next, bool accumulate, float* c) {
  // Tiles of equal height, since another height takes a new configuration: the last of them begins
  // early, and what it shares with the one before is made twice. Both must be loaded before one is
  // stored, so that tiles go by pairs, after one alone if their number is odd.
  const int64_t tiles = (m + kRows - 1) / kRows, height = (m + tiles - 1) / tiles;
  configure(static_cast<int>(height));
  const int64_t calls = tiles / 2 * ((n + 2 * kColumns - 1) / (2 * kColumns)) + tiles % 2;
  const Block block = {lda, k / kTerms, b, n, accumulate, next ? (n + calls - 1) / calls : 0};
  const char* ahead = reinterpret_cast<const char*>(next);
  const int64_t left = k % kTerms;
  Rest rest[2];
  const auto multiply_rows = [&]<int kTall>(std::integral_constant<int, kTall>, int64_t tile) {
    const BFloat16* from[2];
    float* to[2];
    for (int t = 0; t < 2; ++t) {
      const int64_t row = std::min((tile + t) * height, m - height);
      from[t] = a + row * lda, to[t] = c + row * n;
      if (left > 0 && t < kTall) {
        rest[t].copy(from[t] + block.steps * kTerms, lda, left, static_cast<int>(height));
      }
    }
    multiply_tile_rows<kTall>(block, from, left > 0 ? rest : nullptr, ahead, to);
  };
  if (tiles % 2 > 0) multiply_rows(std::integral_constant<int, 1>{}, 0);
  for (int64_t tile = tiles % 2; tile < tiles; tile += 2) {
    multiply_rows(std::integral_constant<int, 2>{}, tile);
  }
}

}  // namespace lstmx::LSTMX_ISA::amx
