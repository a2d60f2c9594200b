// The one contract between torch, the CPU driver and the CUDA launchers: raw pointers to a whole
// sequence of one layer in one direction. Nothing here owns memory.
//
// T steps, B rows, H units, G gates a unit. Rows of all steps lie one after another: N = T * B, or
// the sum of batch_sizes for a packed sequence. All arrays are row-major and dense unless a stride
// is named. "storage" is the tensors' dtype; "compute" is float, or double where storage is double.
#pragma once

#include <cstdint>

namespace lstmx {

// Every cell that the kernels are built for; see CONTRIBUTING, "How to add a cell".
enum class CellKind : int { kLstm, kGru };
inline constexpr int kCells = 2;

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
inline constexpr int kDTypes = 4;
inline constexpr int kMaxStates = 2;

struct SequenceShape {
  int64_t steps;               // T >= 1
  int64_t batch;               // B >= 0
  int64_t hidden;              // H >= 1
  const int64_t* batch_sizes;  // [T] on the host, B first, never growing; null: B at every step
  bool reverse;                // walk from the last step to the first
  int64_t inputs = 0;          // I, where forward multiplies the input itself; else 0
};

struct WeightDropout {
  const int64_t* seed;            // one value, on the device of the weights; null: no mask
  double p;                       // in [0, 1]
  const uint8_t* kept = nullptr;  // for the CPU's kernels, which read no seed: see csrc/cpu/mask.h
};

struct SequenceForwardParams {
  SequenceShape shape;
  WeightDropout dropout;
  const void* x_gates;              // [N, G*H] compute: x W_ih^T; unless shape.inputs > 0, then ...
  int64_t x_gates_stride;           // elements from row to row, >= G*H
  const void* x;                    // ... [N, I] storage,
  const void* w_ih;                 // and [G*H, I] storage
  const void* w_hh;                 // [G*H, H] storage
  const void* b_ih;                 // [G*H] storage, or null
  const void* b_hh;                 // [G*H] storage, or null
  const void* initial[kMaxStates];  // [B, H] storage
  bool from_zero;                   // initial[0] is zeros, which W_hh need not meet
  void* states[kMaxStates];         // [N, H] storage: y, c; c may be null
  void* last[kMaxStates];           // [B, H] storage: each row's final states
  void* saved;  // [saved_end - saved_begin, kSaved*H] storage: of those rows, which are whole
                // steps; or null. Where they are all rows and storage is compute, x_gates may be
                // its first columns (a row's gates are read before they are overwritten)
  int64_t saved_row;  // elements from one of its rows to the next, >= kSaved*H
  int64_t saved_begin, saved_end;
  // The units that a call of one step computes, the first a multiple of the vectors' lanes, as 64
  // is; 0, 0: all. Another step would need them all.
  int64_t unit_begin, unit_end;
  void* workspace;
  bool packed;  // the workspace has the weights already, from a call of these units with at least
                // as many rows
};

struct SequenceBackwardParams {
  SequenceShape shape;
  WeightDropout dropout;
  const void* w_hh;                 // [G*H, H] storage; at T = 1 it may be null: then W_hh's part
                                    // of dinitial[0] is left out
  const void* initial[kMaxStates];  // [B, H] storage
  const void* states[kMaxStates];   // [N, H] storage: y, c as forward left them
  const void* saved;                // [N, kSaved*H] storage
  int64_t saved_row;                // from one of its rows to the next
  const void* dstates[kMaxStates];  // [N, H] storage: gradients of y, c; may be null
  const void* dlast[kMaxStates];    // [B, H] storage: gradients of the final states; may be null,
                                    // or dinitial itself
  void* dgates;                     // [N, kGrads*H] compute, or storage: as the kernels say; of the
                                    // same dtype and rows, it may be `saved` itself
  int64_t dgates_row;               // from one of its rows to the next
  void* dinitial[kMaxStates];       // [B, H] storage, or null
  void* dbias;                      // [kGrads*H] compute: column sums of dgates
  void* workspace;
  bool packed;  // the workspace has W_hh already, from a call with the same B and H
};

// One step, from both halves of its gates: packing weights would not pay.
struct StepParams {
  SequenceShape shape;              // T = 1
  const void* x_gates;              // [B, G*H] compute: x W_ih^T
  const void* h_gates;              // [B, G*H] compute: h W_hh^T; or null, if h is zeros
  const void* b_ih;                 // [G*H] storage, or null
  const void* b_hh;                 // [G*H] storage, or null
  const void* initial[kMaxStates];  // [B, H] storage
  void* states[kMaxStates];         // [B, H] storage, or null: the states after it ...
  void* last[kMaxStates];           // [B, H] storage, or null: ... and once more
  void* saved;                      // [B, kSaved*H] storage, or null
  int64_t saved_row;                // from one of its rows to the next
};

}  // namespace lstmx
