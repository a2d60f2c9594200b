// The sequence kernels for AVX-512.
#if defined(__x86_64__)
// Standard headers come first: their inline functions must be compiled for every machine.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define LSTMX_ISA avx512
#define LSTMX_VECTOR_BYTES 64
#define LSTMX_VECTOR_REGISTERS 32
#include "amx.h"
#include "sequence_kernels.h"

namespace lstmx::cpu {
extern constexpr KernelTable kAvx512Kernels = [] {
  KernelTable table = avx512::kernel_table("avx512");
  table.matrix_unit = {avx512::amx::multiply, avx512::amx::release};
  return table;
}();
}  // namespace lstmx::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
