// The sequence kernels for AVX2 and FMA.
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
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define LSTMX_ISA avx2
#define LSTMX_VECTOR_BYTES 32
#define LSTMX_VECTOR_REGISTERS 16
#include "sequence_kernels.h"

namespace lstmx::cpu {
extern constexpr KernelTable kAvx2Kernels = avx2::kernel_table("avx2");
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
