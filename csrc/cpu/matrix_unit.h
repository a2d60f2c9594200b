// Products of bfloat16 by the processor's matrix unit (AMX, see amx.h), behind pointers: tests put
// something else in.
#pragma once

#include <cstdint>

#include "half.h"

namespace lstmx::cpu {

// Terms of a sum that the unit takes in a step. Where b has fewer, zeros fill it up.
constexpr int64_t kUnitTerms = 32;
// Steps for which 64 columns of b stay in the first-level cache, while all rows meet them; and
// steps that are taken at once if they are all, so that no sum is stored in between.
constexpr int64_t kUnitSteps = 6, kAllUnitSteps = 12;

struct MatrixUnit {
  // c[m][n] (+)= a[m][k] b, in float. b lies in pairs of rows, [k / 2][n][2], up to a multiple of
  // kUnitTerms; k is even, n 16, 32, 48 or 64. `next` is what will be b in the next call, as much
  // of which as of b is fetched into the second-level cache; or null, if it is there.
  void (*multiply)(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda,
                   const BFloat16* b, const BFloat16* next, bool accumulate, float* c) = nullptr;
  // By each thread, after its last product.
  void (*release)() = nullptr;
};

// Without functions where there is no such unit. Set by multiplies_in_pairs().
extern MatrixUnit matrix_unit;

}  // namespace lstmx::cpu
