// The sequence in plain ATen, from the same cells as the kernels: with V = Tensor.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/broadcast_tensors.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "sequence.h"

namespace lstmx {

// philox4x32_10 in wrapping int64 arithmetic, all blocks at once.
Tensor weight_mask_composite(const Tensor& seed, c10::SymIntArrayRef size, double p,
                             at::ScalarType dtype) {
  check_weight_mask(seed, p, "p");
  constexpr int64_t kLow = 0xFFFFFFFF;
  const auto high = [](const Tensor& t) { return t.__rshift__(32).bitwise_and(kLow); };
  const auto low = [](const Tensor& t) { return t.bitwise_and(kLow); };
  c10::SymInt count = 1;
  for (const auto& n : size) count = count * n;

  const auto block = at::arange((count + 3) / 4, seed.options());
  Tensor key0 = low(seed), key1 = high(seed);
  Tensor word[] = {low(block), high(block), at::zeros_like(block), at::zeros_like(block)};
  for (int round = 0; round < 10; ++round) {
    const auto p0 = word[0] * int64_t{0xD2511F53}, p1 = word[2] * int64_t{0xCD9E8D57};
    word[0] = high(p1).bitwise_xor(word[1]).bitwise_xor(key0);
    word[2] = high(p0).bitwise_xor(word[3]).bitwise_xor(key1);
    word[1] = low(p1);
    word[3] = low(p0);
    key0 = low(key0 + int64_t{0x9E3779B9});
    key1 = low(key1 + int64_t{0xBB67AE85});
  }
  // Rule and rounding as in MaskRule.
  const auto threshold = static_cast<int64_t>(p * 4294967296.0 + 0.5);
  const auto words = at::broadcast_tensors({word[0], word[1], word[2], word[3]});
  const auto kept = at::stack(words, -1).flatten(-2).narrow_symint(-1, 0, count).ge(threshold);
  return kept.to(dtype).mul(p < 1 ? 1 / (1 - p) : 0.0).view_symint(size);
}

template <class Cell>
static ForwardResult run_cell(const SequenceArgs& args) {
  constexpr int G = Cell::kGates, kStates = Cell::kStates;
  const int64_t T = args.check_batch_sizes(), B = args.h0.size(0);
  const int64_t* batch_sizes =
      args.batch_sizes ? args.batch_sizes->const_data_ptr<int64_t>() : nullptr;

  auto w_hh = args.w_hh;
  if (args.masked()) {
    w_hh = w_hh *
           call_weight_mask(*args.seed, w_hh.sym_sizes(), args.weight_dropout, w_hh.scalar_type());
  }
  const auto x_gates = at::linear(args.x, args.w_ih, args.b_ih);

  Tensor state[kStates];
  for (int k = 0; k < kStates; ++k) state[k] = args.initial(k);
  std::vector<Tensor> history[kStates];
  for (auto& h : history) h.resize(T);
  int64_t offset = args.reverse ? args.x.size(0) : 0;
  for (int64_t i = 0; i < T; ++i) {
    const int64_t t = args.reverse ? T - 1 - i : i;
    const int64_t rows = batch_sizes ? batch_sizes[t] : B;
    Tensor x_now, x[G], h[G], prev[kStates], next[kStates], saved[Cell::kSaved];
    if (batch_sizes) {
      if (args.reverse) offset -= rows;
      x_now = x_gates.narrow(0, offset, rows);
      if (!args.reverse) offset += rows;
    } else {
      x_now = x_gates.select(0, t);
    }
    for (int k = 0; k < kStates; ++k) prev[k] = state[k].narrow(0, 0, rows);
    const auto x_chunks = x_now.chunk(G, -1);
    const auto h_chunks = at::linear(prev[0], w_hh, args.b_hh).chunk(G, -1);
    for (int g = 0; g < G; ++g) x[g] = x_chunks[g], h[g] = h_chunks[g];
    Cell::forward(x, h, prev, next, saved);
    for (int k = 0; k < kStates; ++k) {
      history[k][t] = next[k];
      state[k] = rows == B ? next[k] : at::cat({next[k], state[k].narrow(0, rows, B - rows)}, 0);
    }
  }
  const auto join = [&](const std::vector<Tensor>& steps) {
    return batch_sizes ? at::cat(steps, 0) : at::stack(steps, 0);
  };
  const auto none = [&] { return at::empty({0}, args.x.options()); };
  return {join(history[0]), state[0].clone(), kStates > 1 ? state[kStates - 1].clone() : none(),
          kStates > 1 ? join(history[kStates - 1]) : none(), none()};
}

ForwardResult sequence_composite(const SequenceArgs& args) {
  args.check();
  return with_cell(args.cell, [&](auto cell) { return run_cell<decltype(cell)>(args); });
}

}  // namespace lstmx
