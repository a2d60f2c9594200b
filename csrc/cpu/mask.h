// Weight dropout's mask, many elements at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../philox.h"
#include "../sequence.h"
#include "vector.h"

namespace lstmx::LSTMX_ISA {

// factor[e - begin] = 0 or the scale, for the elements begin <= e < end of W_hh.
template <class T>
void mask_factors(const MaskRule& rule, int64_t begin, int64_t end, T* factor) {
  constexpr int kBlocks = 16;
  T kept[4 * kBlocks];
  const T scale = static_cast<T>(rule.scale);
  int64_t first = begin / 4;
  while (begin < end) {
    auto blocks = philox_counters<kBlocks>(static_cast<uint64_t>(first));
    philox4x32_10(blocks, rule.seed);
    for (int n = 0; n < kBlocks; ++n) {
      for (int w = 0; w < 4; ++w) kept[4 * n + w] = rule.keeps(blocks.word[w][n]) ? scale : T(0);
    }
    const int64_t skip = begin - 4 * first;
    const int64_t count = std::min<int64_t>(4 * kBlocks - skip, end - begin);
    std::memcpy(factor, kept + skip, static_cast<size_t>(count) * sizeof(T));
    begin += count, factor += count, first += kBlocks;
  }
}

template <class T>
void mask_elements(const WeightDropout& dropout, int64_t begin, int64_t end, T* out) {
  mask_factors(MaskRule::make(*dropout.seed, dropout.p), begin, end, out);
}

}  // namespace lstmx::LSTMX_ISA
