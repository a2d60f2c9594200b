#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "matrix_unit.h"

namespace lstmx::cpu {

static const KernelTable& choose() {
#if defined(__x86_64__)
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  const bool no_vectors = capability && std::strcmp(capability, "default") == 0;
  const bool no_avx512 = no_vectors || (capability && std::strcmp(capability, "avx2") == 0);
  __builtin_cpu_init();
  if (!no_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return kAvx512Kernels;
  if (!no_vectors && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

MatrixUnit matrix_unit;

const Kernels& kernels(DType dtype, bool pairs) {
  const KernelTable& table = kernels();
  const bool compiled = dtype == DType::kBFloat16 && table.pairs.gates.run;
  return pairs && compiled ? table.pairs : table.by_dtype[int(dtype)];
}

bool has_pair_instruction() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace lstmx::cpu
