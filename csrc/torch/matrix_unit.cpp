#include "matrix_unit.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "../cpu/kernels.h"
#include "../cpu/matrix_unit.h"

namespace lstmx {

// brgemm is internal to torch: where a torch has none, or it fails, there is no unit.
#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(__x86_64__)
namespace {

void multiply(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b,
              bool accumulate, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, n, n, accumulate,
                              reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
}

void release() { at::native::cpublas::brgemm_release(/*is_vnni=*/true); }

bool wanted() {
  const char* choice = std::getenv("LSTMX_MATRIX_UNIT");
  if (choice && std::strcmp(choice, "0") == 0) return false;
  if (choice && std::strcmp(choice, "1") == 0) return cpu::has_pair_instruction();
  return __builtin_cpu_supports("amx-bf16");
}

bool trial() {
  constexpr int64_t kM = 2, kN = 16, kK = 4;
  std::array<BFloat16, kM * kK> a;
  std::array<BFloat16, kK * kN> b;
  std::array<float, kM * kN> c{};
  for (int64_t i = 0; i < kM * kK; ++i) narrow(static_cast<float>(i + 1), a[i]);
  for (int64_t i = 0; i < kK * kN; ++i) narrow(static_cast<float>(i % 7 - 3), b[i]);
  try {
    for (const bool accumulate : {false, true}) {
      multiply(kM, kN, kK, a.data(), kK, b.data(), accumulate, c.data());
    }
    release();
  } catch (const std::exception&) {
    return false;
  }
  for (int64_t i = 0; i < kM * kN; ++i) {
    float sum = 0;
    for (int64_t k = 0; k < kK; ++k) {
      sum += widen(a[i / kN * kK + k]) * widen(b[(k / 2 * kN + i % kN) * 2 + k % 2]);
    }
    if (c[i] != 2 * sum) return false;
  }
  return true;
}

}  // namespace

bool multiply_in_pairs() {
  static const bool unit = [] {
    const bool works = wanted() && trial();
    if (works) cpu::matrix_unit = {multiply, release};
    return works;
  }();
  return unit ? at::globalContext().userEnabledMkldnn() : cpu::has_pair_instruction();
}
#else
bool multiply_in_pairs() { return cpu::has_pair_instruction(); }
#endif

}  // namespace lstmx
