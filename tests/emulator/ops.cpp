// The ops torch.ops.lstmx_emulated.*: csrc/torch with the CUDA backend in the place of the CPU's,
// its kernels run by the emulator on tensors in ordinary memory. Here is what that world lacks.
// All is one source: most of the time to compile it goes to torch's headers.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "emulator.h"
#include "torch/autograd.cpp"
#include "torch/cache.cpp"
#include "torch/checks.cpp"
#include "torch/composite.cpp"
#include "torch/inputs.cpp"
#include "torch/library.cpp"
#include "torch/sequence_cuda.cpp"

namespace {

// On CUDA a product of 16-bit factors can come out in float32.
at::Tensor& mm_out(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                   at::Tensor& out) {
  return out.copy_(at::mm(a.to(dtype), b.to(dtype)));
}

// The next launch returns this cudaError_t.
void fail_next_launch(int64_t error) { emulator::injected_error = static_cast<cudaError_t>(error); }

// 0 forward, 1 reverse, 2 random, 3 skew.
void set_order(int64_t order, int64_t seed) {
  TORCH_CHECK_VALUE(order >= 0 && order <= 3, "order must be 0 to 3, got ", order);
  emulator::options().order = static_cast<emulator::Order>(order);
  emulator::options().seed = static_cast<uint32_t>(seed);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("mm.dtype_out", mm_out); }

TORCH_LIBRARY_FRAGMENT(lstmx_emulated, m) {
  m.def("fail_next_launch(int error) -> ()", fail_next_launch);
  m.def("set_order(int order, int seed) -> ()", set_order);
}
