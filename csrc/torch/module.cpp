// The Python module lstmx._C: importing it loads the ops; what is not an op is here.
#include <pybind11/pybind11.h>

#include "../cpu/kernels.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Loads the ops torch.ops.lstmx.*; what is not an op is here.";
  m.def(
      "cpu_capability", [] { return lstmx::cpu::kernels().name; },
      "Name of the instruction set that the CPU kernels use: default, avx2 or avx512.");
#if defined(LSTMX_WITH_CUDA)
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
