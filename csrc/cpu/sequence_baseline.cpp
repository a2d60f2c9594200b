// The sequence kernels for the instructions every machine of the architecture has.
// Standard headers come first: their inline functions must be compiled for every machine.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define LSTMX_ISA baseline
#define LSTMX_VECTOR_BYTES 16
#define LSTMX_VECTOR_REGISTERS 16
#include "sequence_kernels.h"

namespace lstmx::cpu {
extern constexpr KernelTable kBaselineKernels = baseline::kernel_table("default");
}
