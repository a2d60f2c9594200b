// Weight dropout's mask, many elements at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../philox.h"
#include "../sequence.h"
#include "pass.h"
#include "vector.h"

namespace lstmx::LSTMX_ISA {

// A word of each of as many blocks as there are lanes, for philox4x32_10. Two vectors of them,
// since the rounds are one long chain; see Rows.
struct WordLanes {
  static constexpr int kLanes = LSTMX_VECTOR_BYTES / 4, kVectors = 2;
  RawWord raw[kVectors];

  WordLanes() = default;
  LSTMX_INLINE explicit WordLanes(uint32_t x) {
    for (RawWord& vector : raw) vector = x + RawWord{};
  }
  LSTMX_INLINE friend WordLanes operator^(const WordLanes& a, const WordLanes& b) {
    WordLanes result;
    for (int v = 0; v < kVectors; ++v) result.raw[v] = a.raw[v] ^ b.raw[v];
    return result;
  }
};

// factor times the even words, which are the lower halves of the lanes.
LSTMX_INLINE RawLong multiply_even(RawLong words, uint32_t factor) {
#if LSTMX_VECTOR_BYTES >= 32
  // Gcc would multiply all 64 bits.
  RawLong product;
  asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(words), "v"(factor + RawWord{}));
  return product;
#else
  return (words & 0xFFFFFFFFu) * factor;
#endif
}

LSTMX_INLINE WideProduct<WordLanes> multiply_wide(uint32_t factor, const WordLanes& words) {
  constexpr uint64_t kLow = 0xFFFFFFFF;
  WideProduct<WordLanes> product;
  for (int v = 0; v < WordLanes::kVectors; ++v) {
    const auto pairs = (RawLong)words.raw[v];
    const RawLong even = multiply_even(pairs, factor), odd = multiply_even(pairs >> 32, factor);
    product.high.raw[v] = (RawWord)((even >> 32) | (odd & ~kLow));
    product.low.raw[v] = (RawWord)((even & kLow) | (odd << 32));
  }
  return product;
}

// ---- Bits: element e of W_hh is kept if bit e % 8 of byte e / 8 is set -------------------------

// Elements that are drawn at once: a block for each lane.
constexpr int64_t kDraw = 4 * WordLanes::kLanes * WordLanes::kVectors;

// Bytes for so many elements: whole draws, and what a load of a vector's bits may reach beyond.
constexpr int64_t mask_bytes(int64_t elements) {
  return (elements + kDraw - 1) / kDraw * kDraw / 8 + int64_t{sizeof(uint32_t)};
}

// Lane n as bit n: whether it is at least `least`.
LSTMX_INLINE uint32_t at_least_bits(RawWord words, uint32_t least) {
#if LSTMX_VECTOR_BYTES == 64
  return _mm512_cmpge_epu32_mask((__m512i)words, (__m512i)(least + RawWord{}));
#elif LSTMX_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(words >= least)));
#else
  uint32_t bits = 0;
  for (int n = 0; n < WordLanes::kLanes; ++n) bits |= uint32_t{words[n] >= least} << n;
  return bits;
#endif
}

// Of each four lanes the ones from kFirst on, two of a and two of b by turns.
template <int kFirst, int... kLane>
LSTMX_INLINE RawWord interleaved(RawWord a, RawWord b, std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = WordLanes::kLanes;
  return __builtin_shufflevector(a, b,
                                 (kLane / 4 * 4 + kFirst + kLane % 4 / 2 + kLane % 2 * kLanes)...);
}

// The bits of kDraw elements, the blocks counted from `index` on.
LSTMX_INLINE void draw(const MaskRule& rule, uint64_t index, uint8_t* to) {
  constexpr int kLanes = WordLanes::kLanes, kFours = kLanes / 4;
  constexpr auto kAllLanes = std::make_integer_sequence<int, kLanes>{};
  // A block's four words come to lie side by side if four lanes together take every fourth block:
  // then each such four is a square to transpose.
  RawWord lane;
  for (int n = 0; n < kLanes; ++n) lane[n] = static_cast<uint32_t>(n % 4 * kFours + n / 4);
  PhiloxBlock<WordLanes> blocks{};
  for (int v = 0; v < WordLanes::kVectors; ++v, index += kLanes) {
    const RawWord low = static_cast<uint32_t>(index) + lane;
    blocks.word[0].raw[v] = low;
    blocks.word[1].raw[v] = static_cast<uint32_t>(index >> 32) + (RawWord)((low < lane) & 1);
  }
  philox4x32_10(blocks, rule.seed);

  for (int v = 0; v < WordLanes::kVectors; ++v, to += kLanes / 2) {
    RawWord pairs[4], words[4];
    for (int w = 0; w < 2; ++w) {
      const RawWord a = blocks.word[w].raw[v], b = blocks.word[w + 2].raw[v];
      pairs[w] = interleaved<0>(a, b, kAllLanes);
      pairs[w + 2] = interleaved<2>(a, b, kAllLanes);
    }
    for (int half = 0; half < 4; half += 2) {
      words[half] = interleaved<0>(pairs[half], pairs[half + 1], kAllLanes);
      words[half + 1] = interleaved<2>(pairs[half], pairs[half + 1], kAllLanes);
    }
    uint64_t bits = 0;
    for (int w = 0; w < 4; ++w) {
      const uint64_t of_word = at_least_bits(words[w], static_cast<uint32_t>(rule.threshold));
      bits |= of_word << (w * kLanes);
    }
    if (rule.threshold >> 32) bits = 0;
    std::memcpy(to, &bits, kLanes / 2);
  }
}

// The bits from that of element `begin`, a multiple of kDraw, to that of `end`, and up to a draw.
inline void draw_mask(const MaskRule& rule, int64_t begin, int64_t end, uint8_t* to) {
  for (int64_t e = begin; e < end; e += kDraw, to += kDraw / 8) {
    draw(rule, static_cast<uint64_t>(e / 4), to);
  }
}

// 1 for each element from `element` on that is kept, else 0.
template <class T>
LSTMX_INLINE Vec<T> kept_lanes(const uint8_t* kept, int64_t element) {
  uint32_t bits;
  std::memcpy(&bits, kept + element / 8, sizeof(bits));
  bits >>= element % 8;
#if LSTMX_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    return (RawFloat)_mm512_maskz_mov_ps(__mmask16(bits), (__m512)Vec<float>(1.0f).raw);
  } else {
    return (RawDouble)_mm512_maskz_mov_pd(__mmask8(bits), (__m512d)Vec<double>(1.0).raw);
  }
#else
  using Bits = typename Vec<T>::Bits;
  Bits lane;
  for (int n = 0; n < Vec<T>::kLanes; ++n) lane[n] = uint32_t{1} << n;
  return (bits & lane) != 0 ? Vec<T>(T(1)).raw : Vec<T>(T(0)).raw;
#endif
}

// A whole matrix's, made before it is first read: for a run of its elements that begins in the
// middle of a block, whole blocks would be drawn at either end.
struct DrawMask {
  const MaskRule rule;
  const int64_t elements;
  uint8_t* const kept;

  void run(int member, int team) const {
    const Range draws = share((elements + kDraw - 1) / kDraw, member, team);
    draw_mask(rule, draws.begin * kDraw, draws.end * kDraw, kept + draws.begin * (kDraw / 8));
  }
};

// out[e - begin] = 0 or the scale.
template <class T>
void mask_elements(const WeightDropout& dropout, int64_t begin, int64_t end, T* out) {
  constexpr int64_t kRun = 1024;
  const auto rule = MaskRule::make(*dropout.seed, dropout.p);
  const Vec<T> scale(static_cast<T>(rule.scale));
  uint8_t kept[mask_bytes(kRun)];
  for (int64_t run = begin / kRun * kRun; run < end; run += kRun) {
    draw_mask(rule, run, run + kRun, kept);
    const int64_t first = std::max(run, begin), count = std::min(run + kRun, end) - first;
    for (int64_t i = 0; i < count; i += Vec<T>::kLanes) {
      with_lanes<T>(count - i, [&](auto lanes) {
        store(out + (first - begin + i), kept_lanes<T>(kept, first - run + i) * scale, lanes);
      });
    }
  }
}

}  // namespace lstmx::LSTMX_ISA
