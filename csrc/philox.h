// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the weight
// dropout mask made of it. The same bits on every device: element e of W_hh, counted row by row,
// takes word e % 4 of the block whose counter is e / 4 and whose key is the seed.
#pragma once

#include <cstdint>

#include "cells/math.h"

namespace lstmx {

// N independent blocks, word-major, so that a compiler can run them side by side.
template <int N>
struct PhiloxBlocks {
  uint32_t word[4][N];
};

template <int N>
LSTMX_HD void philox4x32_10(PhiloxBlocks<N>& blocks, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int n = 0; n < N; ++n) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * blocks.word[0][n];
      const uint64_t p1 = uint64_t{0xCD9E8D57u} * blocks.word[2][n];
      blocks.word[0][n] = static_cast<uint32_t>(p1 >> 32) ^ blocks.word[1][n] ^ key0;
      blocks.word[1][n] = static_cast<uint32_t>(p1);
      blocks.word[2][n] = static_cast<uint32_t>(p0 >> 32) ^ blocks.word[3][n] ^ key1;
      blocks.word[3][n] = static_cast<uint32_t>(p0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
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

// The blocks counted first_block, first_block + 1, ..., before the rounds.
template <int N>
LSTMX_HD PhiloxBlocks<N> philox_counters(uint64_t first_block) {
  PhiloxBlocks<N> blocks;
  for (int n = 0; n < N; ++n) {
    const uint64_t block = first_block + static_cast<uint64_t>(n);
    blocks.word[0][n] = static_cast<uint32_t>(block);
    blocks.word[1][n] = static_cast<uint32_t>(block >> 32);
    blocks.word[2][n] = 0;
    blocks.word[3][n] = 0;
  }
  return blocks;
}

}  // namespace lstmx
