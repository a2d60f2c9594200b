#include "inputs.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/roll.h>

namespace lstmx {

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

Inputs::Inputs(const SequenceArgs& args)
    : x((args.check(), args.x.contiguous())),
      w_ih(args.w_ih.contiguous()),
      w_hh(args.w_hh.contiguous()),
      b_ih(contiguous(args.b_ih)),
      b_hh(contiguous(args.b_hh)),
      batch_sizes(contiguous(args.batch_sizes)),
      seed(args.seed),
      compute(at::toOpMathType(x.scalar_type())),
      dtype(dtype_of(x)),
      H(w_hh.size(1)),
      B(args.h0.size(0)),
      N(args.batch_sizes ? x.size(0) : x.size(0) * B) {
  shape = {args.check_batch_sizes(), B, H,
           batch_sizes ? batch_sizes->const_data_ptr<int64_t>() : nullptr, args.reverse};
  initial[0] = args.h0.contiguous();
  if (args.c0) initial[1] = args.c0->contiguous();
  if (args.masked()) dropout = {seed->const_data_ptr<int64_t>(), args.weight_dropout};
  with_cell(args.cell, [&](auto cell) {
    using Cell = decltype(cell);
    kind = std::is_same_v<Cell, Lstm> ? CellKind::kLstm : CellKind::kGru;
    G = Cell::kGates, states = Cell::kStates, saved = Cell::kSaved, grads = Cell::kGrads;
    input_grads = Cell::kInputGrads, hidden_grads = Cell::kHiddenGrads;
    input_rotation = Cell::kInputRotation;
  });
}

Tensor Inputs::previous(int state, const Tensor& values) const {
  const auto rows = values.view({N, H});
  const auto& first = initial[state];
  if (!shape.batch_sizes) {
    const auto inner = shape.reverse ? rows.narrow(0, B, N - B) : rows.narrow(0, 0, N - B);
    auto joined = empty({N, H});
    return shape.reverse ? at::cat_out(joined, {inner, first})
                         : at::cat_out(joined, {first, inner});
  }
  std::vector<Tensor> pieces;
  for (int64_t t = 0, offset = 0; t < shape.steps; ++t) {
    const int64_t count = shape.batch_sizes[t];
    const int64_t other = shape.reverse ? (t + 1 < shape.steps ? shape.batch_sizes[t + 1] : 0)
                                        : (t > 0 ? shape.batch_sizes[t - 1] : 0);
    const int64_t from = shape.reverse ? offset + count : offset - other;
    const int64_t known = std::min(count, other);
    if (known > 0) pieces.push_back(rows.narrow(0, from, known));
    if (known < count) pieces.push_back(first.narrow(0, known, count - known));
    offset += count;
  }
  auto joined = empty({N, H});
  return at::cat_out(joined, pieces);
}

std::pair<Tensor, Tensor> Inputs::bias_grads(const Tensor& sums) const {
  const auto grad = [&](int64_t first, int64_t rotation) {
    auto gates = sums.narrow(0, first, G);
    if (rotation != 0) gates = at::roll(gates, -rotation, 0);
    return gates.to(x.scalar_type(), /*non_blocking=*/false, /*copy=*/true).view({G * H});
  };
  return {grad(input_grads, input_rotation), grad(hidden_grads, 0)};
}

}  // namespace lstmx
