// The CPU kernels as the rest of the project calls them: one table of functions for each
// instruction set, and the choice between them.
#pragma once

#include <cstdint>

#include "../sequence.h"
#include "matrix_unit.h"

namespace lstmx::cpu {

// How a call shares out its work.
struct Plan {
  int threads;
  bool by_rows;  // each thread has rows of the batch and all units; else units and all rows
  int64_t weight_bytes;
};

// `threads` is an upper bound. Scratch memory comes from the caller: as many bytes as the
// *_workspace function of the same table says, which reads sizes only, aligned to 64.
struct CellKernels {
  // Whether forward had better multiply the input itself, which shape.inputs then says.
  bool (*fuses_input)(const SequenceShape&, int64_t inputs, int threads);
  int64_t (*forward_workspace)(const SequenceForwardParams&, int threads);
  void (*forward)(const SequenceForwardParams&, int threads);
  int64_t (*backward_workspace)(const SequenceBackwardParams&, int threads);
  void (*backward)(const SequenceBackwardParams&, int threads);
  void (*step)(const StepParams&, int threads);
  Plan (*plan)(const SequenceShape&, int threads);
};

// c [m, n] = a [m, k] b [k, n], or c + a b, times the mask of a W_hh of c's size if there is one.
// Strides are in elements; of a and b, rows or columns lie side by side, of c columns; see
// c_turned. Row i of a rotated b (whose columns lie side by side) or c stands at (i + rotation) mod
// its number of rows.
struct ProductParams {
  int64_t m, n, k;
  const void* a;
  int64_t a_row, a_column;
  const void* b;
  int64_t b_row, b_column, b_rotation;
  void* c;
  int64_t c_row, c_rotation;
  bool accumulate;  // add to c
  bool c_turned;    // it is c^T that is wanted: columns lie c_row apart
  WeightDropout dropout;
  void* workspace;
};

struct ProductKernel {
  int64_t (*workspace)(const ProductParams&, int threads);
  void (*run)(const ProductParams&, int threads);
};

// What there is for one dtype.
struct Kernels {
  CellKernels cells[kCells];
  ProductKernel gates;  // a, b storage; c compute
  ProductKernel grads;  // a as dgates; b, c storage
  ProductKernel sums;   // a as dgates; b storage; c compute
  bool dgates_in_storage;
};

struct KernelTable {
  const char* name;  // as ATEN_CPU_CAPABILITY spells it: default, avx2, avx512
  Kernels by_dtype[kDTypes];
  Kernels pairs;           // for bfloat16, where the processor multiplies it in pairs
  MatrixUnit matrix_unit;  // for processors of that set that have one
  // WeightDropout's `kept`, and the bytes that it takes for so many elements of W_hh.
  int64_t (*mask_bytes)(int64_t elements);
  void (*draw_mask)(const WeightDropout&, int64_t elements, uint8_t* kept, int threads);
  // out[e - begin] = 0 or 1 / (1 - p) for elements begin <= e < end of W_hh; out is compute.
  void (*mask_float)(const WeightDropout&, int64_t begin, int64_t end, float* out);
  void (*mask_double)(const WeightDropout&, int64_t begin, int64_t end, double* out);
};

// The best table that the machine can run, at most `capability` (a name as above; null or unknown:
// no limit). Decided once, from ATEN_CPU_CAPABILITY.
const KernelTable& kernels();

// Of that table, for bfloat16 those that multiply it in pairs if wanted. They need the instructions
// for bfloat16, also with the matrix unit (matrix_unit.h): without them, the others are returned.
const Kernels& kernels(DType dtype, bool pairs);
// What the processor has, and whether the system lets this process use it.
bool has_bfloat16_instructions();
bool has_matrix_unit();
// Size of the cache that each core has to itself. 1 MiB where the system does not say.
int64_t second_level_bytes();
// Whether bfloat16 had better be multiplied in pairs. Decided once; the first call puts in the
// matrix unit, if there is one, unless the environment's LSTMX_MATRIX_UNIT is 0.
bool multiplies_in_pairs();

extern const KernelTable kBaselineKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

}  // namespace lstmx::cpu
