// One layer and direction over a sequence, in terms of tensors: arguments, checks, and the forms in
// which it is computed. The ops of library.cpp are made of these.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../sequence.h"

namespace lstmx {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// In backward, gates are computed again in so many chunks at most, of so many rows at least.
inline constexpr int64_t kMostChunks = 10, kLeastChunkRows = 320;

struct SequenceArgs {
  std::string cell;
  Tensor x;                    // [T, B, I], or [N, I] with batch_sizes
  Tensor h0;                   // [B, H]
  OptionalTensor c0;           // [B, H], for cells with a second state
  Tensor w_ih;                 // [G*H, I]
  Tensor w_hh;                 // [G*H, H]
  OptionalTensor b_ih;         // [G*H]
  OptionalTensor b_hh;         // [G*H]
  OptionalTensor batch_sizes;  // int64 [T] on the CPU
  bool reverse;
  OptionalTensor seed;  // int64 scalar on x's device
  double weight_dropout;

  bool masked() const { return seed.has_value() && weight_dropout > 0; }
  const Tensor& initial(int state) const { return state == 0 ? h0 : *c0; }

  // Everything that can be told from sizes, dtypes and devices; symbolic sizes are understood.
  void check() const;
  // What needs the values of batch_sizes. Returns T.
  int64_t check_batch_sizes() const;

  // N, and how many rows' gates memory="low" keeps: those that backward meets first. To keep them
  // costs no memory that it would not need a little later, and they need not be computed again.
  c10::SymInt sym_rows() const {
    return batch_sizes ? x.sym_size(0) : x.sym_size(0) * x.sym_size(1);
  }
  c10::SymInt sym_rows_kept() const;
};

// Which rows a call keeps the gates of: the last `count` that it comes to, whole steps.
struct SavedRows {
  int64_t begin, end;

  static SavedRows make(const SequenceShape& shape, int64_t rows, int64_t count) {
    return shape.reverse ? SavedRows{0, count} : SavedRows{rows - count, rows};
  }
};

// y [as x, H], h_n [B, H], c_n [B, H], c [as y], saved [saved_rows, kSaved, H]; [0] for a state
// that does not exist or was not asked for.
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
// Of x, h0, c0, w_ih, w_hh, b_ih, b_hh; undefined where not asked for.
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
inline constexpr int kInputs = 7;

// Gradients of y, h_n, c_n, c; absent means zero.
using OutputGrads = std::array<OptionalTensor, 4>;

// The same in plain ATen: differentiable any number of times, and understood by every transform.
// The last of the five results is empty.
ForwardResult sequence_composite(const SequenceArgs& args);
Tensor weight_mask_composite(const Tensor& seed, c10::SymIntArrayRef size, double p,
                             at::ScalarType dtype);

// Calls the op of that name through the dispatcher.
ForwardResult call_sequence_forward(const SequenceArgs& args, const c10::SymInt& saved_rows,
                                    bool cell_states);
BackwardResult call_sequence_backward(const SequenceArgs& args, const OutputGrads& grads,
                                      const Tensor& y, const Tensor& c, const Tensor& saved,
                                      std::array<bool, kInputs> needed);
Tensor call_weight_mask(const Tensor& seed, c10::SymIntArrayRef size, double p,
                        at::ScalarType dtype);

// With autograd: y, h_n, c_n, c.
std::tuple<Tensor, Tensor, Tensor, Tensor> sequence_autograd(const SequenceArgs& args,
                                                             bool save_gates, bool cell_states);

void check_weight_mask(const Tensor& seed, double p, const char* p_name);

// Calls body(Cell{}) for the cell of that name.
template <class Body>
auto with_cell(std::string_view name, Body&& body) {
  if (name == Lstm::kName) return body(Lstm{});
  if (name == Gru::kName) return body(Gru{});
  TORCH_CHECK_VALUE(false, "cell must be one of 'lstm', 'gru', got '", name, "'");
}

}  // namespace lstmx
