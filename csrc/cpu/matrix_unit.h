// Products of bfloat16 by the processor's matrix unit (AMX). oneDNN drives it, and torch exports
// that; since nothing here knows torch, the binding puts the functions in.
#pragma once

#include <cstdint>

#include "half.h"

namespace lstmx::cpu {

struct MatrixUnit {
  // c[m][n] (+)= a[m][k] b, in float. b lies in pairs of rows, [k / 2][n][2]; k is even, n a
  // multiple of 16. It may compile a kernel for each m, n, k and lda that it meets.
  void (*multiply)(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda,
                   const BFloat16* b, bool accumulate, float* c) = nullptr;
  // By each thread, after its last product.
  void (*release)() = nullptr;
};

// Without functions where there is no such unit. Set before the first kernel runs.
extern MatrixUnit matrix_unit;

}  // namespace lstmx::cpu
