// cuBLAS itself, not ATen's mm: it takes the precision as an argument (docs/adr/0004-tf32.md), and
// how a product is to be made is asked once, not at every step.
#include "blas.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <map>
#include <mutex>

namespace lstmx {
namespace {

// In the order of DType.
constexpr cudaDataType_t kTypes[kDTypes] = {CUDA_R_32F, CUDA_R_64F, CUDA_R_16BF, CUDA_R_16F};

void check(cublasStatus_t status, const Product& p) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "lstmx: a product of ", p.m, " x ", p.k, " and ",
              p.k, " x ", p.n, " failed in cuBLAS: ", cublasGetStatusString(status));
}

// A matrix to cuBLAS, which counts by columns: a row-major matrix is to it the transpose.
struct Matrix {
  Matrix() = default;
  Matrix(cudaDataType_t type, int64_t rows, int64_t columns, int64_t row, int64_t column,
         const Product& p, int64_t next)
      : turned(column == 1 ? CUBLAS_OP_N : CUBLAS_OP_T) {
    if (column == 1) std::swap(rows, columns);
    check(cublasLtMatrixLayoutInit(&layout, type, rows, columns, column == 1 ? row : column), p);
    const auto count = static_cast<int32_t>(p.count);
    set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, count, p);
    set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, next, p);
  }
  template <class T>
  void set(cublasLtMatrixLayoutAttribute_t name, const T& value, const Product& p) {
    check(cublasLtMatrixLayoutSetAttribute(&layout, name, &value, sizeof value), p);
  }
  // cuBLAS takes them as not const.
  cublasLtMatrixLayout_t get() const { return const_cast<cublasLtMatrixLayout_t>(&layout); }

  cublasLtMatrixLayoutOpaque_t layout;
  cublasOperation_t turned;
};

// All of a product but its addresses.
struct Plan {
  cublasLtMatmulDescOpaque_t operation;
  Matrix a, b, c;
  cublasLtMatmulAlgo_t algorithm;
};

Plan make_plan(cublasLtHandle_t handle, const Product& p, DType dtype, bool tf32) {
  const bool wide = dtype == DType::kFloat64;
  const auto type = kTypes[static_cast<int>(dtype)];
  const auto compute_type = wide ? CUDA_R_64F : CUDA_R_32F;
  Plan plan;
  check(cublasLtMatmulDescInit(&plan.operation,
                               wide   ? CUBLAS_COMPUTE_64F
                               : tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32
                                      : CUBLAS_COMPUTE_32F,
                               compute_type),
        p);
  plan.a = Matrix(type, p.m, p.k, p.a_row, p.a_column, p, p.a_next);
  plan.b = Matrix(type, p.k, p.n, p.b_row, p.b_column, p, p.b_next);
  plan.c = Matrix(p.narrow ? type : compute_type, p.m, p.n, p.c_row, 1, p, p.c_next);
  const auto set = [&](auto name, const auto& value) {
    check(cublasLtMatmulDescSetAttribute(&plan.operation, name, &value, sizeof value), p);
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, plan.b.turned);  // c^T = b^T a^T
  set(CUBLASLT_MATMUL_DESC_TRANSB, plan.a.turned);

  cublasLtMatmulPreferenceOpaque_t preference;
  check(cublasLtMatmulPreferenceInit(&preference), p);
  const auto prefer = [&](auto name, const auto& value) {
    check(cublasLtMatmulPreferenceSetAttribute(&preference, name, &value, sizeof value), p);
  };
  const size_t workspace = at::cuda::getCUDABlasLtWorkspaceSize();
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  constexpr uint32_t kAlignment = 16;
  for (const auto name :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    prefer(name, kAlignment);
  }
  cublasLtMatmulHeuristicResult_t found;
  int count = 0;
  check(cublasLtMatmulAlgoGetHeuristic(handle, &plan.operation, plan.b.get(), plan.a.get(),
                                       plan.c.get(), plan.c.get(), &preference, 1, &found, &count),
        p);
  check(count > 0 ? found.state : CUBLAS_STATUS_NOT_SUPPORTED, p);
  plan.algorithm = found.algo;
  return plan;
}

// The plan of such a product, made the first time.
std::shared_ptr<const Plan> find_plan(cublasLtHandle_t handle, const Product& p, DType dtype,
                                      bool tf32, int device) {
  constexpr size_t kMost = 4096;  // where sizes never come back, what is kept would grow
  using Key = std::array<int64_t, 16>;
  static std::mutex mutex;
  static std::map<Key, std::shared_ptr<const Plan>> plans;
  const Key key = {p.m,   p.n,      p.k,        p.a_row,  p.a_column, p.b_row,
                   p.b_column, p.c_row, p.narrow, p.count,  p.a_next,   p.b_next,
                   p.c_next, static_cast<int64_t>(dtype), tf32, device};
  const std::lock_guard lock(mutex);
  const auto place = plans.find(key);
  if (place != plans.end()) return place->second;
  if (plans.size() >= kMost) plans.clear();
  return plans[key] = std::make_shared<const Plan>(make_plan(handle, p, dtype, tf32));
}

}  // namespace

Blas::Blas(DType dtype, bool tf32) : dtype_(dtype), tf32_(tf32) {
  C10_CUDA_CHECK(cudaGetDevice(&device_));
  // A thread that has not met the device yet, as one of autograd's, has no context for cuBLAS.
  C10_CUDA_CHECK(cudaSetDevice(device_));
  handle_ = at::cuda::getCurrentCUDABlasLtHandle();
  stream_ = c10::cuda::getCurrentCUDAStream().stream();
  workspace_ = at::cuda::getCUDABlasLtWorkspace();
}

void Blas::multiply(const Product& p) const {
  if (p.m == 0 || p.n == 0) return;
  const auto handle = static_cast<cublasLtHandle_t>(handle_);
  const auto plan = find_plan(handle, p, dtype_, tf32_, device_);
  const float scalars[] = {1, 0};
  const double wide_scalars[] = {1, 0};
  const bool wide = dtype_ == DType::kFloat64;
  const void* one = wide ? static_cast<const void*>(&wide_scalars[0]) : &scalars[0];
  const void* zero = wide ? static_cast<const void*>(&wide_scalars[1]) : &scalars[1];
  check(cublasLtMatmul(handle, const_cast<cublasLtMatmulDesc_t>(&plan->operation), one, p.b,
                       plan->b.get(), p.a, plan->a.get(), zero, p.c, plan->c.get(), p.c,
                       plan->c.get(), &plan->algorithm, workspace_,
                       at::cuda::getCUDABlasLtWorkspaceSize(),
                       static_cast<cudaStream_t>(stream_)),
        p);
}

}  // namespace lstmx
