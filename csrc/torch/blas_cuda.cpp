// cuBLAS itself, not ATen's mm: it takes the precision as an argument, and costs the host less time
// at each step (docs/adr/0004-tf32.md).
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAException.h>

#include "blas.h"

namespace lstmx {
namespace {

// In the order of DType.
constexpr cudaDataType_t kTypes[kDTypes] = {CUDA_R_32F, CUDA_R_64F, CUDA_R_16BF, CUDA_R_16F};

// cuBLAS counts by columns. A row-major matrix is to it its transpose, of rows as far apart.
struct Operand {
  Operand(const void* data, int64_t row, int64_t column)
      : data(data),
        turned(column == 1 ? CUBLAS_OP_N : CUBLAS_OP_T),
        stride(column == 1 ? row : column) {}
  const void* data;
  cublasOperation_t turned;
  int64_t stride;
};

}  // namespace

Blas::Blas(DType dtype, bool tf32) : dtype_(dtype), tf32_(tf32) {
  // A thread that has not met the device yet, as one of autograd's, has no context for cuBLAS.
  int device = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaSetDevice(device));
  const at::NoTF32Guard exact;  // the handle's own mode; see multiply
  handle_ = at::cuda::getCurrentCUDABlasHandle();
}

void Blas::multiply(const Product& p) const {
  if (p.m == 0 || p.n == 0) return;
  const bool wide = dtype_ == DType::kFloat64;
  const auto type = kTypes[static_cast<int>(dtype_)];
  const auto result = wide ? CUDA_R_64F : p.narrow ? type : CUDA_R_32F;
  const auto compute = wide    ? CUBLAS_COMPUTE_64F
                       : tf32_ ? CUBLAS_COMPUTE_32F_FAST_TF32
                               : CUBLAS_COMPUTE_32F;
  const float scalars[] = {1, 0};
  const double wide_scalars[] = {1, 0};
  const auto scalar = [&](int i) -> const void* {
    if (wide) return &wide_scalars[i];
    return &scalars[i];
  };
  const Operand a(p.a, p.a_row, p.a_column), b(p.b, p.b_row, p.b_column);
  // c^T = b^T a^T
  const auto status = cublasGemmStridedBatchedEx_64(
      static_cast<cublasHandle_t>(handle_), b.turned, a.turned, p.n, p.m, p.k, scalar(0), b.data,
      type, b.stride, p.b_next, a.data, type, a.stride, p.a_next, scalar(p.add ? 0 : 1), p.c,
      result, p.c_row, p.c_next, p.count, compute, CUBLAS_GEMM_DEFAULT);
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "lstmx: a product of ", p.m, " x ", p.k, " and ",
              p.k, " x ", p.n, " failed in cuBLAS: ", cublasGetStatusString(status));
}

}  // namespace lstmx
