#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "stepwise.cuh"

namespace lstmx::cuda {
namespace {

template <class Cell, class Storage>
constexpr CellKernels kCell = {forward_step<Cell, Storage>, backward_step<Cell, Storage>,
                               kSummed<Cell, Storage>};

// In the order of DType.
template <class Cell>
constexpr CellKernels kCells[kDTypes] = {kCell<Cell, float>, kCell<Cell, double>,
                                         kCell<Cell, BFloat16>, kCell<Cell, Float16>};

template <class Storage>
constexpr DTypeKernels kDType = {prepare<Storage>, finish<Storage>, mask<Storage>,
                                 sum_rows<Storage>};

constexpr DTypeKernels kDTypeTable[kDTypes] = {kDType<float>, kDType<double>, kDType<BFloat16>,
                                               kDType<Float16>};

}  // namespace

#define LSTMX_TEXT_(...) #__VA_ARGS__
#define LSTMX_TEXT(...) LSTMX_TEXT_(__VA_ARGS__)
const char* architectures() {
#if defined(__CUDA_ARCH_LIST__)
  return LSTMX_TEXT(__CUDA_ARCH_LIST__);
#else
  return "none";
#endif
}

const CellKernels& cell_kernels(CellKind cell, DType dtype) {
  const auto index = static_cast<int>(dtype);
  return cell == CellKind::kLstm ? kCells<Lstm>[index] : kCells<Gru>[index];
}

const DTypeKernels& dtype_kernels(DType dtype) { return kDTypeTable[static_cast<int>(dtype)]; }

}  // namespace lstmx::cuda
