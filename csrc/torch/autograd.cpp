// Derivatives. The first comes from the kernels. When the graph of a derivative is asked for
// (create_graph), it is made of the composite instead, so that every further one is right.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "sequence.h"

namespace lstmx {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool under_transform() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

std::array<OptionalTensor, kInputs> differentiable_inputs(const SequenceArgs& args) {
  return {args.x, args.h0, args.c0, args.w_ih, args.w_hh, args.b_ih, args.b_hh};
}

SequenceArgs with_inputs(const SequenceArgs& args,
                         const std::array<OptionalTensor, kInputs>& inputs) {
  SequenceArgs result = args;
  result.x = *inputs[0], result.h0 = *inputs[1], result.c0 = inputs[2];
  result.w_ih = *inputs[3], result.w_hh = *inputs[4];
  result.b_ih = inputs[5], result.b_hh = inputs[6];
  return result;
}

// Each input enters through a view of its own. Its gradient is then what arrives at the view: not
// what would reach it again through another input that depends on it.
variable_list backward_with_graph(const SequenceArgs& args, const variable_list& grads,
                                  const std::array<bool, kInputs>& needed) {
  auto inputs = differentiable_inputs(args);
  variable_list sources;
  for (int i = 0; i < kInputs; ++i) {
    if (!inputs[i]) continue;
    inputs[i] = inputs[i]->view_as(*inputs[i]);
    if (needed[i]) sources.push_back(*inputs[i]);
  }
  const auto [y, h_n, c_n, c, saved] = sequence_composite(with_inputs(args, inputs));
  variable_list outputs, output_grads;
  const Tensor* all[] = {&y, &h_n, &c_n, &c};
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].defined()) continue;
    outputs.push_back(*all[i]);
    output_grads.push_back(grads[i]);
  }
  const auto found = torch::autograd::grad(outputs, sources, output_grads, /*retain_graph=*/true,
                                           /*create_graph=*/true, /*allow_unused=*/true);
  variable_list result(kInputs);
  for (int i = 0, next = 0; i < kInputs; ++i) {
    if (inputs[i] && needed[i]) result[i] = found[next++];
  }
  return result;
}

OptionalTensor defined(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

struct SequenceFunction : torch::autograd::Function<SequenceFunction> {
  // The tensors stand apart from args, which holds them too, because only arguments are tracked.
  static variable_list forward(AutogradContext* ctx, const SequenceArgs& args, bool save_gates,
                               bool cell_states, const Tensor& x, const Tensor& h0,
                               const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                               const OptionalTensor& b_ih, const OptionalTensor& b_hh) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, h_n, c_n, c, saved] = call_sequence_forward(
        args, save_gates ? args.sym_rows() : args.sym_rows_kept(), /*cell_states=*/true);
    const auto tensor = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
    ctx->save_for_backward({x, h0, tensor(c0), w_ih, w_hh, tensor(b_ih), tensor(b_hh), y, c, saved,
                            tensor(args.batch_sizes), tensor(args.seed)});
    ctx->saved_data["cell"] = args.cell;
    ctx->saved_data["reverse"] = args.reverse;
    ctx->saved_data["weight_dropout"] = args.weight_dropout;
    ctx->set_materialize_grads(false);
    if (!cell_states) c = at::empty({0}, y.options());
    if (!args.c0) {
      ctx->mark_non_differentiable({c_n, c});
    } else if (!cell_states) {
      ctx->mark_non_differentiable({c});
    }
    return {y, h_n, c_n, c};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const SequenceArgs args = {ctx->saved_data["cell"].toStringRef(),
                               saved[0],
                               saved[1],
                               defined(saved[2]),
                               saved[3],
                               saved[4],
                               defined(saved[5]),
                               defined(saved[6]),
                               defined(saved[10]),
                               ctx->saved_data["reverse"].toBool(),
                               defined(saved[11]),
                               ctx->saved_data["weight_dropout"].toDouble()};
    std::array<bool, kInputs> needed{};
    for (int i = 0, edge = 0; i < kInputs; ++i) {
      if (saved[i].defined()) needed[i] = ctx->needs_input_grad(edge++);
    }
    variable_list result(3);  // args, save_gates, cell_states
    if (at::GradMode::is_enabled()) {
      const auto found = backward_with_graph(args, grads, needed);
      result.insert(result.end(), found.begin(), found.end());
      return result;
    }
    const OutputGrads given = {defined(grads[0]), defined(grads[1]), defined(grads[2]),
                               defined(grads[3])};
    const auto found = call_sequence_backward(args, given, saved[7], saved[8], saved[9], needed);
    std::apply([&](const auto&... t) { (result.push_back(t), ...); }, found);
    return result;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> sequence_autograd(const SequenceArgs& args,
                                                             bool save_gates, bool cell_states) {
  bool requires_grad = false, has_tangent = false;
  for (const auto& t : differentiable_inputs(args)) {
    if (!t) continue;
    requires_grad |= t->requires_grad();
    has_tangent |= torch::autograd::isFwGradDefined(*t);
  }
  if (under_transform() || has_tangent) {
    const auto [y, h_n, c_n, c, saved] = sequence_composite(args);
    return {y, h_n, c_n, cell_states ? c : at::empty({0}, y.options())};
  }
  if (!requires_grad || !at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, h_n, c_n, c, saved] = call_sequence_forward(args, /*saved_rows=*/0, cell_states);
    return {y, h_n, c_n, c};
  }
  const auto out = SequenceFunction::apply(args, save_gates, cell_states, args.x, args.h0, args.c0,
                                           args.w_ih, args.w_hh, args.b_ih, args.b_hh);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace lstmx
