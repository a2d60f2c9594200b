// Copies of matrices in the order in which products read them. An operand's elements lie in groups:
// one float or double; two bfloat16, which the matrix unit takes together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "mask.h"
#include "matrix_unit.h"
#include "pass.h"
#include "vector.h"

namespace lstmx::LSTMX_ISA {

template <class O>
constexpr int kGroup = sizeof(O) == 2 ? 2 : 1;
template <class O>
constexpr int64_t grouped(int64_t count) {
  return (count + kGroup<O> - 1) / kGroup<O> * kGroup<O>;
}

// Rows of a panel, the last of them zeros: whatever is multiplied in pairs may meet the matrix
// unit.
template <class O>
constexpr int64_t panel_rows(int64_t depth) {
  constexpr int64_t kStep = kGroup<O> > 1 ? cpu::kUnitTerms : 1;
  return (depth + kStep - 1) / kStep * kStep;
}

// What a matrix is copied through: weight dropout's bits, if it has any. Here a kept weight stays
// as it is, whatever its type; the scale belongs to the sums, which are float.
struct Mask {
  const uint8_t* kept = nullptr;
  double scale = 1;

  static Mask make(const WeightDropout& dropout) {
    if (!dropout.kept) return {};
    return {dropout.kept, MaskRule::make(0, dropout.p).scale};
  }
};

// to[i] = from[i] as an operand, for i < count, and 0 up to `end`. `element` is the place of
// from[0] in the matrix that the mask is of.
template <class O, class S>
LSTMX_INLINE void copy_run(const S* from, int64_t count, int64_t end, const Mask& mask,
                           int64_t element, O* to) {
  if (mask.kept) {
    using T = ComputeOf<S>;
    for (int64_t i = 0; i < count; i += Vec<T>::kLanes) {
      // Exact, and a dropped NaN stays one, as in torch.
      with_lanes<T>(count - i, [&](auto lanes) {
        store(to + i, load<T>(from + i, lanes) * kept_lanes<T>(mask.kept, element + i), lanes);
      });
    }
  } else {
    const auto copy = [&](int64_t n) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<O, S>) {
        if (n > 0) std::memcpy(to, from, n * sizeof(O));  // gcc copies 16-bit ones one by one
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
      }
    };
    if (count == end) return copy(end);  // often a constant, where count is not
    copy(count);
  }
  for (int64_t i = count; i < end; ++i) to[i] = O{};
}

// A square of words, one group each.
template <class O>
struct Square {
  using Word = std::conditional_t<sizeof(O) == 8, double, float>;
  using Raw = typename Vec<Word>::Raw;
  static constexpr int kLanes = Vec<Word>::kLanes;
  static constexpr int kRun = kLanes * kGroup<O>;  // elements of a row of words

  LSTMX_INLINE void transpose() { transpose(rows[0], kRun); }
  // The same of rows that lie elsewhere.
  LSTMX_INLINE void transpose(const O* from, int64_t ld) {
    Raw words[kLanes];
    for (int i = 0; i < kLanes; ++i) std::memcpy(&words[i], from + i * ld, sizeof(Raw));
    exchange<1>(words);
    std::memcpy(rows, words, sizeof(rows));
  }

  alignas(64) O rows[kLanes][kRun];

 private:
  // Blocks of 1, 2, 4, ... lanes change places across the diagonal.
  template <int kStep>
  LSTMX_INLINE static void exchange(Raw (&words)[kLanes]) {
    if constexpr (kStep < kLanes) {
      constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i & kStep) continue;
        const Raw a = words[i], b = words[i + kStep];
        words[i] = mix<kStep, true>(a, b, lanes);
        words[i + kStep] = mix<kStep, false>(a, b, lanes);
      }
      exchange<2 * kStep>(words);
    }
  }
  template <int kStep, bool kFirst, int... kLane>
  LSTMX_INLINE static Raw mix(Raw a, Raw b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b,
                                   (kFirst ? (kLane & kStep ? kLanes + kLane - kStep : kLane)
                                           : (kLane & kStep ? kLanes + kLane : kLane + kStep))...);
  }
};

// pairs[n] = (first[n], second[n])
LSTMX_INLINE void interleave(const BFloat16* first, const BFloat16* second, int64_t count,
                             BFloat16* pairs) {
  for (int64_t n = 0; n < count; ++n) {
    const uint32_t pair = first[n].bits | uint32_t{second[n].bits} << 16;
    std::memcpy(pairs + 2 * n, &pair, sizeof(pair));
  }
}

// The same of what a mask keeps; `element` and, of second[0], `element2` are as in copy_run.
LSTMX_INLINE void interleave(const BFloat16* first, const BFloat16* second, int64_t count,
                             const uint8_t* kept, int64_t element, int64_t element2,
                             BFloat16* pairs) {
  for (int64_t n = 0; n < count; n += Vec<float>::kLanes) {
    const auto low = load<float>(first + n) * kept_lanes<float>(kept, element + n);
    const auto high = load<float>(second + n) * kept_lanes<float>(kept, element2 + n);
    const RawWord pair = (RawWord)low.raw >> 16 | ((RawWord)high.raw & 0xFFFF0000u);
    std::memcpy(pairs + 2 * n, &pair, sizeof(pair));
  }
}

// A part of a panel, to[k / group][n][k % group], from a matrix whose rows are the panel's columns:
// one vector of them, of which `columns` exist; `width` columns are in the whole panel. The depth
// is filled up with zeros to whole groups.
template <class O, class S>
void pack_turned(const S* from, int64_t ld, int64_t columns, int64_t depth, const Mask& mask,
                 int64_t element, int64_t width, O* to) {
  using Words = Square<O>;
  constexpr int64_t kLongRun = 64;
  Words square;
  alignas(64) O rows[Words::kLanes][kLongRun];
  for (int64_t k = 0; k < depth; k += kLongRun) {
    const int64_t count = std::min(kLongRun, depth - k);
    for (int n = 0; n < Words::kLanes; ++n) {
      const int64_t at = n < columns ? n * ld + k : 0;
      copy_run(from + at, n < columns ? count : 0, kLongRun, mask, element + at, rows[n]);
    }
    for (int64_t i = 0; i < count; i += Words::kRun) {
      square.transpose(rows[0] + i, kLongRun);
      const int64_t groups = grouped<O>(std::min<int64_t>(Words::kRun, count - i)) / kGroup<O>;
      for (int64_t g = 0; g < groups; ++g) {
        std::memcpy(to + ((k + i) / kGroup<O> + g) * width * kGroup<O>, square.rows[g],
                    sizeof(square.rows[g]));
      }
    }
  }
}

// A panel of `width` <= kMost columns from a matrix with the same rows, which may be rotated;
// `columns` of them exist, and `lead` rows of zeros come first.
template <int64_t kMost, class O, class S>
void pack_straight(const S* from, int64_t ld, int64_t columns, int64_t depth, int64_t lead,
                   int64_t rotation, const Mask& mask, int64_t element, int64_t width, O* to) {
  const auto copy = [&](int64_t k, O* row) __attribute__((always_inline)) {
    const bool exists = k >= 0 && k < depth;
    const int64_t at = exists ? rotated(k, rotation, depth) * ld : 0;
    if (exists && columns == kMost) {  // most often; then the count is a constant
      copy_run(from + at, kMost, kMost, mask, element + at, row);
    } else {
      copy_run(from + at, exists ? columns : 0, width, mask, element + at, row);
    }
  };
  for (int64_t k = -lead; k < depth; k += kGroup<O>, to += kGroup<O> * width) {
    if constexpr (kGroup<O> == 1) {
      copy(k, to);
    } else if (columns == kMost && k >= 0 && k + 1 < depth) {
      const int64_t first = rotated(k, rotation, depth) * ld;
      const int64_t second = rotated(k + 1, rotation, depth) * ld;
      if (mask.kept) {
        interleave(from + first, from + second, kMost, mask.kept, element + first, element + second,
                   to);
      } else {
        interleave(from + first, from + second, kMost, to);
      }
    } else {
      O first[kMost], second[kMost];
      copy(k, first);
      copy(k + 1, second);
      interleave(first, second, width, to);
    }
  }
}

// to[m][k] = from[k][m] in bfloat16; the depth is filled up with zeros to `end`.
LSTMX_INLINE void turn_rows(const BFloat16* from, int64_t ld, int64_t rows, int64_t depth,
                            int64_t end, BFloat16* to, int64_t to_ld) {
  using Words = Square<BFloat16>;
  constexpr int64_t kLanes = Words::kLanes;
  static constexpr BFloat16 kZeros[kLanes] = {};
  Words square;
  BFloat16 some[2][kLanes] = {};
  for (int64_t k = 0; k < end; k += Words::kRun) {
    const int64_t count = std::min<int64_t>(Words::kRun, end - k);
    for (int64_t m = 0; m < rows; m += kLanes) {
      const int64_t columns = std::min(kLanes, rows - m);
      for (int i = 0; i < kLanes; ++i) {
        const BFloat16* pair[2];
        for (int half = 0; half < 2; ++half) {
          const int64_t row = k + 2 * i + half;
          const BFloat16* run = from + row * ld + m;
          __builtin_prefetch(run + Words::kRun * ld);  // rows are far apart, so not foreseen
          if (row >= depth) run = kZeros;
          if (columns < kLanes) run = std::copy_n(run, columns, some[half]) - columns;
          pair[half] = run;
        }
        interleave(pair[0], pair[1], kLanes, square.rows[i]);
      }
      square.transpose();
      for (int64_t i = 0; i < columns; ++i) {
        BFloat16* run = to + (m + i) * to_ld + k;
        if (count == Words::kRun) {
          std::memcpy(run, square.rows[i], sizeof(square.rows[i]));
        } else {
          std::copy_n(square.rows[i], count, run);
        }
      }
    }
  }
}

}  // namespace lstmx::LSTMX_ISA
