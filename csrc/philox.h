// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the weight
// dropout mask made of it. The same bits on every device: element e of W_hh, counted row by row,
// takes word e % 4 of the block whose counter is e / 4 and whose key is the seed.
#pragma once

#include <cstdint>

#include "cells/math.h"

namespace lstmx {

// Word is uint32_t, or a vector of them for as many independent blocks.
template <class Word>
struct PhiloxBlock {
  Word word[4];
};

template <class Word>
struct WideProduct {
  Word high, low;
};

LSTMX_HD WideProduct<uint32_t> multiply_wide(uint32_t a, uint32_t b) {
  const uint64_t product = uint64_t{a} * b;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
}

template <class Word>
LSTMX_HD void philox4x32_10(PhiloxBlock<Word>& block, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const auto p0 = multiply_wide(0xD2511F53u, block.word[0]);
    const auto p1 = multiply_wide(0xCD9E8D57u, block.word[2]);
    block.word[0] = p1.high ^ block.word[1] ^ Word(key0);
    block.word[1] = p1.low;
    block.word[2] = p0.high ^ block.word[3] ^ Word(key1);
    block.word[3] = p0.low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The block counted `index`, before the rounds.
LSTMX_HD PhiloxBlock<uint32_t> philox_counter(uint64_t index) {
  return {{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, 0}};
}

// DropConnect of W_hh (Wan et al. 2013; Merity et al. 2017): an entry survives with probability
// 1 - p and is then scaled by 1 / (1 - p).
struct MaskRule {
  uint64_t seed = 0;
  uint64_t threshold = 0;  // a word below it drops its entry; 2^32 drops all
  double scale = 1;

  LSTMX_HD static MaskRule make(int64_t seed, double p) {
    return {static_cast<uint64_t>(seed), static_cast<uint64_t>(p * 4294967296.0 + 0.5),
            p < 1 ? 1 / (1 - p) : 0};
  }

  LSTMX_HD bool keeps(uint32_t word) const { return word >= threshold; }
};

}  // namespace lstmx
