// The Python module lstmx._C: importing it loads the ops; what is not an op is here.
#include <pybind11/pybind11.h>

#include <string_view>

#include "../cpu/kernels.h"
#include "../cpu/matrix_unit.h"
#include "cache.h"
#if defined(LSTMX_WITH_CUDA)
#include "../cuda/kernels.h"
#endif

namespace lstmx {
namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(LSTMX_WITH_CUDA)
  info["cuda_architectures"] = cuda::architectures();
#else
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

const char* bfloat16_products() {
  if (!cpu::kernels(DType::kBFloat16, cpu::multiplies_in_pairs()).dgates_in_storage)
    return "float32";
  return cpu::matrix_unit.multiply ? "matrix unit" : "pairs";
}

py::dict cpu_plan(std::string_view cell, int64_t T, int64_t B, int64_t H, int threads) {
  const auto kind = cell == "lstm" ? CellKind::kLstm : CellKind::kGru;
  const auto& kernels = cpu::kernels(DType::kFloat32, /*pairs=*/false);
  const auto plan = kernels.cells[int(kind)].plan({T, B, H, nullptr, false}, threads);
  py::dict result;
  result["threads"] = plan.threads;
  result["by_rows"] = plan.by_rows;
  result["weight_bytes"] = plan.weight_bytes;
  return result;
}

}  // namespace
}  // namespace lstmx

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Loads the ops torch.ops.lstmx.*; what is not an op is here.";
  m.def(
      "cpu_capability", [] { return lstmx::cpu::kernels().name; },
      "Name of the instruction set that the CPU kernels use: default, avx2 or avx512.");
  m.def("bfloat16_products", lstmx::bfloat16_products,
        "How the CPU multiplies bfloat16 now: matrix unit, pairs or float32.");
  m.def("build_info", lstmx::build_info, "Compiler, OpenMP, CUDA architectures (None without).");
  m.def("cached_bytes", lstmx::cached_bytes, "Bytes of memory that are kept for later calls.");
  m.def("empty_cache", lstmx::empty_cache, "Gives them back to the system.");
  m.def("cpu_plan", lstmx::cpu_plan, "How a sequence of float32 would share out its work.",
        pybind11::arg("cell"), pybind11::arg("T"), pybind11::arg("B"), pybind11::arg("H"),
        pybind11::arg("threads"));
#if defined(LSTMX_WITH_CUDA)
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
