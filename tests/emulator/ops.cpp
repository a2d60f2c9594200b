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

namespace lstmx {

// In the place of cuBLAS.
Blas::Blas(DType dtype, bool tf32) : dtype_(dtype), tf32_(tf32), handle_(nullptr) {}

void Blas::multiply(const Product& p) const {
  constexpr at::ScalarType types[kDTypes] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
  const auto type = types[static_cast<int>(dtype_)];
  const auto compute = dtype_ == DType::kFloat64 ? at::kDouble : at::kFloat;
  const auto matrices = [&](const void* data, int64_t rows, int64_t columns,
                            at::IntArrayRef strides, at::ScalarType dtype) {
    return at::from_blob(const_cast<void*>(data), {p.count, rows, columns}, strides,
                         at::TensorOptions(dtype));
  };
  const auto factor = [&](const at::Tensor& t) {
    const auto wide = t.to(compute);
    if (!tf32_) return wide;
    constexpr int64_t half = 0x1000, kept = 0xFFFFE000;
    return wide.view(at::kInt).add(half).bitwise_and(static_cast<int32_t>(kept)).view(at::kFloat);
  };
  const auto a = matrices(p.a, p.m, p.k, {p.a_next, p.a_row, p.a_column}, type);
  const auto b = matrices(p.b, p.k, p.n, {p.b_next, p.b_row, p.b_column}, type);
  auto c = matrices(p.c, p.m, p.n, {p.c_next, p.c_row, 1}, p.narrow ? type : compute);
  const auto product = at::bmm(factor(a), factor(b));
  p.add ? c.add_(product) : c.copy_(product);
}

}  // namespace lstmx

namespace {

// The next launch returns this cudaError_t.
void fail_next_launch(int64_t error) { emulator::injected_error = static_cast<cudaError_t>(error); }

// 0 forward, 1 reverse, 2 random, 3 skew.
void set_order(int64_t order, int64_t seed) {
  TORCH_CHECK_VALUE(order >= 0 && order <= 3, "order must be 0 to 3, got ", order);
  emulator::options().order = static_cast<emulator::Order>(order);
  emulator::options().seed = static_cast<uint32_t>(seed);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lstmx_emulated, m) {
  m.def("fail_next_launch(int error) -> ()", fail_next_launch);
  m.def("set_order(int order, int seed) -> ()", set_order);
}
