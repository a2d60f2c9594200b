// Weight dropout's mask, many elements at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../philox.h"
#include "../sequence.h"
#include "vector.h"

namespace lstmx::LSTMX_ISA {

// A word of each of kLanes blocks, for philox4x32_10.
struct WordLanes {
  static constexpr int kLanes = LSTMX_VECTOR_BYTES / 4;
  RawWord raw;

  WordLanes() = default;
  LSTMX_INLINE WordLanes(RawWord r) : raw(r) {}
  LSTMX_INLINE explicit WordLanes(uint32_t x) : raw(x + RawWord{}) {}
  LSTMX_INLINE friend WordLanes operator^(WordLanes a, WordLanes b) { return a.raw ^ b.raw; }
};

typedef uint64_t RawWide __attribute__((vector_size(LSTMX_VECTOR_BYTES)));

// factor times the even words, which are the lower halves of the lanes.
LSTMX_INLINE RawWide multiply_even(RawWide words, uint32_t factor) {
#if LSTMX_VECTOR_BYTES >= 32
  // Gcc would multiply all 64 bits.
  RawWide product;
  asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(words), "v"(factor + RawWord{}));
  return product;
#else
  return (words & 0xFFFFFFFFu) * factor;
#endif
}

LSTMX_INLINE WideProduct<WordLanes> multiply_wide(uint32_t factor, WordLanes words) {
  const auto pairs = (RawWide)words.raw;
  const RawWide even = multiply_even(pairs, factor), odd = multiply_even(pairs >> 32, factor);
  constexpr uint64_t kLow = 0xFFFFFFFF;
  return {(RawWord)((even >> 32) | (odd & ~kLow)), (RawWord)((even & kLow) | (odd << 32))};
}

// 0 or the scale for a run of up to kMost elements of W_hh.
template <class T, int64_t kMost>
class MaskRun {
  static constexpr int kLanes = WordLanes::kLanes, kBatch = 4 * kLanes;

 public:
  // The factor of element `begin`; those up to `end` follow.
  LSTMX_INLINE const T* make(const MaskRule& rule, int64_t begin, int64_t end) {
    const int64_t first = begin / 4, blocks = (end + 3) / 4 - first;
    int64_t block = 0;
    for (; blocks - block > 1; block += kLanes) {
      many(rule, static_cast<uint64_t>(first + block), factors_ + 4 * block);
    }
    if (block < blocks) one(rule, static_cast<uint64_t>(first + block), factors_ + 4 * block);
    return factors_ + begin % 4;
  }

 private:
  static void one(const MaskRule& rule, uint64_t index, T* factor) {
    auto block = philox_counter(index);
    philox4x32_10(block, rule.seed);
    for (int w = 0; w < 4; ++w) factor[w] = rule.keeps(block.word[w]) ? T(rule.scale) : T(0);
  }

  // kLanes blocks. A block's four words come to lie side by side if four lanes together take every
  // fourth block: then each such four is a square to transpose.
  static void many(const MaskRule& rule, uint64_t index, T* factor) {
    constexpr int kFours = kLanes / 4;
    RawWord lane;
    for (int n = 0; n < kLanes; ++n) lane[n] = static_cast<uint32_t>(n % 4 * kFours + n / 4);
    PhiloxBlock<WordLanes> blocks{};
    const RawWord low = static_cast<uint32_t>(index) + lane;
    blocks.word[0] = low;
    blocks.word[1] = static_cast<uint32_t>(index >> 32) + (RawWord)((low < lane) & 1);
    blocks.word[2] = blocks.word[3] = WordLanes(0);
    philox4x32_10(blocks, rule.seed);

    // 2^32 drops every word.
    const auto least = static_cast<uint32_t>(rule.threshold);
    const float keep = rule.threshold >> 32 ? 0.0f : 1.0f;
    RawFloat kept[4], pairs[4];
    for (int w = 0; w < 4; ++w) {
      kept[w] = blocks.word[w].raw >= least ? keep + RawFloat{} : RawFloat{};
    }
    for (int w = 0; w < 2; ++w) {
      pairs[w] = interleaved<0>(kept[w], kept[w + 2], kAllLanes);
      pairs[w + 2] = interleaved<2>(kept[w], kept[w + 2], kAllLanes);
    }
    for (int half = 0; half < 4; half += 2) {
      kept[half] = interleaved<0>(pairs[half], pairs[half + 1], kAllLanes);
      kept[half + 1] = interleaved<2>(pairs[half], pairs[half + 1], kAllLanes);
    }
    float all[kBatch];
    std::memcpy(all, kept, sizeof(all));
    const T scale = static_cast<T>(rule.scale);
    for (int i = 0; i < kBatch; ++i) factor[i] = all[i] * scale;
  }

  // Of each four lanes the ones from kFirst on, two of a and two of b by turns.
  static constexpr auto kAllLanes = std::make_integer_sequence<int, kLanes>{};
  template <int kFirst, int... kLane>
  LSTMX_INLINE static RawFloat interleaved(RawFloat a, RawFloat b,
                                           std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(
        a, b, (kLane / 4 * 4 + kFirst + kLane % 4 / 2 + kLane % 2 * kLanes)...);
  }

  // A run may begin within a block, and the last batch is made whole.
  alignas(64) T factors_[(kMost + 3 + kBatch - 1) / kBatch * kBatch];
};

template <class T>
void mask_elements(const WeightDropout& dropout, int64_t begin, int64_t end, T* out) {
  constexpr int64_t kRun = 1024;
  const auto rule = MaskRule::make(*dropout.seed, dropout.p);
  MaskRun<T, kRun> run;
  for (int64_t e = begin; e < end; e += kRun) {
    const int64_t count = std::min(kRun, end - e);
    out = std::copy_n(run.make(rule, e, e + count), count, out);
  }
}

}  // namespace lstmx::LSTMX_ISA
