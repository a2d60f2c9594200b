// The two nonlinearities of the cells, for scalars on host and device. Vector types bring their own
// overloads, found by argument-dependent lookup, as do ATen tensors.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define LSTMX_HD __host__ __device__ __forceinline__
#else
// Always inline: a copy emitted for one instruction set must never replace another's at link time.
#define LSTMX_HD inline __attribute__((always_inline))
#endif

namespace lstmx {

LSTMX_HD float tanh(float x) { return ::tanhf(x); }
LSTMX_HD double tanh(double x) { return ::tanh(x); }

LSTMX_HD float sigmoid(float x) {
#if defined(__CUDA_ARCH__)
  // Two units in the last place: the branches of exact divisions are a tenth of a step's kernel.
  return __fdividef(1.0f, 1.0f + ::expf(-x));
#else
  return 1.0f / (1.0f + ::expf(-x));
#endif
}
LSTMX_HD double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }

}  // namespace lstmx
