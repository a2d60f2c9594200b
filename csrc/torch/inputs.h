// A sequence's arguments as the kernels of any device want them: dense, with every size at hand.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "../sequence.h"
#include "cache.h"
#include "sequence.h"

namespace lstmx {

DType dtype_of(const Tensor& t);

inline const void* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr() : nullptr;
}
inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(t->contiguous()) : std::nullopt;
}

struct Inputs {
  // Checks the arguments.
  explicit Inputs(const SequenceArgs& args);

  Tensor empty(at::IntArrayRef size) const { return empty_cached(size, x.options()); }
  Tensor empty_compute(at::IntArrayRef size) const {
    return empty_cached(size, x.options().dtype(compute));
  }
  // y and c have the leading dimensions of x.
  std::vector<int64_t> output_size() const {
    return batch_sizes ? std::vector<int64_t>{N, H} : std::vector<int64_t>{shape.steps, B, H};
  }
  Tensor x_rows() const { return x.view({N, x.size(-1)}); }

  // [N, H]: what each row's step found as that state, of which all later values are given.
  Tensor previous(int state, const Tensor& values) const;

  // The gradients of b_ih and b_hh, from the [kGrads, H] sums over all rows.
  std::pair<Tensor, Tensor> bias_grads(const Tensor& sums) const;

  Tensor x, w_ih, w_hh;
  OptionalTensor b_ih, b_hh, batch_sizes, seed;
  at::ScalarType compute;
  DType dtype;
  int64_t H, B, N;
  SequenceShape shape;
  Tensor initial[kMaxStates];
  WeightDropout dropout{nullptr, 0};
  CellKind kind;
  int64_t G, states, saved, grads, input_grads, hidden_grads, input_rotation;
};

}  // namespace lstmx
