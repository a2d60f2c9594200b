#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "matrix_unit.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
  pairs =
      pairs && dtype == DType::kBFloat16 && table.pairs.gates.run && has_bfloat16_instructions();
  return pairs ? table.pairs : table.by_dtype[int(dtype)];
}

bool has_bfloat16_instructions() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_matrix_unit() {
#if defined(__x86_64__) && defined(__linux__)
  // Linux saves the unit's registers for processes that ask for them (Documentation/arch/x86/
  // xstate.rst).
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = __builtin_cpu_supports("amx-tile") &&
                              __builtin_cpu_supports("amx-bf16") &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

int64_t second_level_bytes() {
  static const int64_t bytes = [] {
    int64_t known = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    known = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return known > 0 ? known : int64_t{1} << 20;
  }();
  return bytes;
}

// Intel's processors take longer to multiply a pair than the same terms as float32, AMD's half as
// long (docs/adr/0008).
static bool pair_instruction_pays() {
#if defined(__x86_64__)
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool multiplies_in_pairs() {
  static const bool pairs = [] {
    const KernelTable& table = kernels();
    if (&kernels(DType::kBFloat16, /*pairs=*/true) != &table.pairs) return false;
    const char* choice = std::getenv("LSTMX_MATRIX_UNIT");
    const bool wanted = !choice || std::strcmp(choice, "0") != 0;
    if (wanted && table.matrix_unit.multiply && has_matrix_unit()) {
      matrix_unit = table.matrix_unit;
      return true;
    }
    return pair_instruction_pays();
  }();
  return pairs;
}

}  // namespace lstmx::cpu
