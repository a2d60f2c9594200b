// The CUDA kernels as the rest of the project calls them. No torch, no allocation, no waiting: each
// function puts one kernel on the stream of the current device and says whether that went well.
//
// Rows are padded so that every matrix product runs on rows of whole 16-byte words: Hp and Ip are H
// and I rounded up to kPad. What lies in the padding of an operand is zero. "storage" and "compute"
// are as in sequence.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../cells/math.h"
#include "../sequence.h"

namespace lstmx::cuda {

inline constexpr int64_t kPad = 16;
LSTMX_HD constexpr int64_t padded(int64_t count) { return (count + kPad - 1) / kPad * kPad; }

// ---- One step ----------------------------------------------------------------------------------

// The cell, for all rows and units of one step, after both halves of the gates are known.
struct ForwardStepParams {
  int64_t rows, hidden;
  const void* x_gates;        // [rows, G, Hp] compute: x W_ih^T
  const void* h_gates;        // [rows, G, Hp] compute: h_{t-1} W_hh^T; unused if x_gates are the
                              // sum of both, as CellKernels says
  int64_t next_rows;          // of the step after this one, 0 at the last one;
  const void* next_x_gates;   // where its x_gates lie, for the cache
  const void* b_ih;           // [G, H] storage, or null
  const void* b_hh;           // [G, H] storage, or null
  const void* h;              // [rows, Hp] storage: h_{t-1}
  void* next_h;               // [rows, Hp] storage: h_t, may be h itself; or null
  void* carried[kMaxStates];  // [rows, H] compute: the other states, changed in place; 0 unused
  void* states[kMaxStates];   // [rows, H] storage: y, c; each may be null
  void* saved;                // [rows, kSaved, H] storage, or null
};

// The cell's gradient. Rows below `product_rows` were active in the step after this one and get
// what W_hh sends back from it; of these, rows from `rows` on have no step here and end.
struct BackwardStepParams {
  int64_t rows, product_rows, hidden, batch;
  int64_t previous_rows;             // rows from here on begin at this step
  const void* saved;                 // [rows, kSaved, H] storage
  const void* states[kMaxStates];    // [rows, H] storage: y, c of this step
  const void* previous[kMaxStates];  // [previous_rows, H] storage: y, c of the step before
  const void* initial[kMaxStates];   // [B, H] storage
  const void* dstates[kMaxStates];   // [rows, H] storage: gradients of y, c; may be null
  // The same of the step that backward comes to next, for the cache, of rows below `next_rows`.
  int64_t next_rows;
  const void* next_saved;
  const void* next_previous[kMaxStates];
  const void* next_dstates[kMaxStates];
  const void* product;      // [G, B, Hp] compute: each gate's part of what W_hh sends
                            // back from the step after, dgates W_hh
  void* carry[kMaxStates];  // [B, H] compute: the states' gradients, changed in place
  void* dgates;             // [rows, kGrads, Hp] storage
};

struct CellKernels {
  cudaError_t (*forward_step)(const ForwardStepParams&, cudaStream_t);
  cudaError_t (*backward_step)(const BackwardStepParams&, cudaStream_t);
  bool summed;  // forward_step finds h W_hh^T added to x_gates
};

// ---- Weights -----------------------------------------------------------------------------------

// prepare: storage [G, H, K] -> storage [G, Hp, Kp], with zeros in the padding; K < 2^31.
// finish: compute [G, Hp, Kp] -> storage [G, H, K]. Gate g lies at (g + rotation) % G of the padded
// side. The mask of a [G*H, K] matrix is applied on the way, if there is one.
struct WeightParams {
  int64_t gates, hidden, columns;
  int64_t rotation;
  WeightDropout dropout;
  const void* from;
  void* to;
};

// out [count] compute = 0 or 1 / (1 - p).
struct MaskParams {
  int64_t count;
  WeightDropout dropout;
  void* out;
};

// Sums of columns, always in the same order.
inline constexpr int kSumChunks = 16;
struct SumRowsParams {
  int64_t rows, columns;  // columns: whole multiples of kPad
  const void* in;         // [rows, columns] storage
  void* partial;          // [kSumChunks, columns] compute
  void* out;              // [columns] compute
};

struct DTypeKernels {
  cudaError_t (*prepare)(const WeightParams&, cudaStream_t);
  cudaError_t (*finish)(const WeightParams&, cudaStream_t);
  cudaError_t (*mask)(const MaskParams&, cudaStream_t);
  cudaError_t (*sum_rows)(const SumRowsParams&, cudaStream_t);
};

// What the kernels were compiled for, as nvcc counts: "800,900".
const char* architectures();

const CellKernels& cell_kernels(CellKind, DType);
const DTypeKernels& dtype_kernels(DType);

}  // namespace lstmx::cuda
