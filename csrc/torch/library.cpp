// The ops: schemas, and all kernels that are the same for every device.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include "ops.h"
#include "sequence.h"

namespace lstmx {
namespace {

bool saves_gates(std::string_view memory) {
  TORCH_CHECK_VALUE(memory == "high" || memory == "low", "memory must be 'high' or 'low', got '",
                    memory, "'");
  return memory == "high";
}

using LstmResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using GruResult = std::tuple<Tensor, Tensor>;

// The public ops differ only in how a sequence is computed from its arguments.
template <LstmResult (*compute)(const SequenceArgs&, bool save_gates, bool cell_states)>
LstmResult lstm_sequence(const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
                         const Tensor& w_hh, LSTMX_TAIL, std::string_view memory,
                         bool cell_states) {
  return compute(
      {Lstm::kName, x, h0, c0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, seed, weight_dropout},
      saves_gates(memory), cell_states);
}

template <LstmResult (*compute)(const SequenceArgs&, bool save_gates, bool cell_states)>
GruResult gru_sequence(const Tensor& x, const Tensor& h0, const Tensor& w_ih, const Tensor& w_hh,
                       LSTMX_TAIL, std::string_view memory) {
  const auto [y, h_n, c_n, c] = compute({Gru::kName, x, h0, std::nullopt, w_ih, w_hh, b_ih, b_hh,
                                         batch_sizes, reverse, seed, weight_dropout},
                                        saves_gates(memory), false);
  return {y, h_n};
}

// ---- Ways to compute ---------------------------------------------------------------------------

LstmResult without_autograd(const SequenceArgs& args, bool, bool cell_states) {
  const auto [y, h_n, c_n, c, saved] = call_sequence_forward(args, /*saved_rows=*/0, cell_states);
  return {y, h_n, c_n, c};
}

LstmResult by_composite(const SequenceArgs& args, bool, bool cell_states) {
  const auto [y, h_n, c_n, c, saved] = sequence_composite(args);
  return {y, h_n, c_n, cell_states ? c : at::empty({0}, y.options())};
}

// All inputs in autocast's dtype, as for torch's own recurrent nets.
template <c10::DeviceType device, c10::DispatchKey key>
LstmResult by_autocast(const SequenceArgs& args, bool save_gates, bool cell_states) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto dtype = at::autocast::get_lower_precision_fp_from_device_type(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
  const auto cast_optional = [&](const OptionalTensor& t) {
    return t ? OptionalTensor(cast(*t)) : std::nullopt;
  };
  SequenceArgs low = args;
  low.x = cast(args.x), low.h0 = cast(args.h0), low.c0 = cast_optional(args.c0);
  low.w_ih = cast(args.w_ih), low.w_hh = cast(args.w_hh);
  low.b_ih = cast_optional(args.b_ih), low.b_hh = cast_optional(args.b_hh);
  return sequence_autograd(low, save_gates, cell_states);
}

[[maybe_unused]] void refuse_cuda(const c10::OperatorHandle&, c10::DispatchKeySet,
                                  torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false,
      "lstmx was built without CUDA; build it again with LSTMX_CUDA=1, a CUDA build of torch ",
      "and the CUDA toolkit, or move the tensors to the CPU");
}

// ---- Shapes ------------------------------------------------------------------------------------

ForwardResult sequence_forward_meta(const SequenceArgs& args, c10::SymInt saved_rows,
                                    bool cell_states) {
  args.check();
  const auto [states, saved] = with_cell(args.cell, [](auto cell) {
    return std::pair<int, int>(decltype(cell)::kStates, decltype(cell)::kSaved);
  });
  const auto empty = [&](std::vector<c10::SymInt> size) {
    return at::empty_symint(size, args.x.options());
  };
  const auto H = args.w_hh.sym_size(1);
  auto like_x = args.x.sym_sizes().vec();
  like_x.back() = H;
  const std::vector<c10::SymInt> none = {0}, last = args.h0.sym_sizes().vec();
  return {empty(like_x), empty(last), empty(states > 1 ? last : none),
          empty(states > 1 && cell_states ? like_x : none),
          empty({std::move(saved_rows), saved, H})};
}

BackwardResult sequence_backward_meta(const SequenceArgs& args, const OutputGrads&, const Tensor&,
                                      const Tensor&, const Tensor&,
                                      std::array<bool, kInputs> needed) {
  const OptionalTensor inputs[] = {args.x,    args.h0,   args.c0,  args.w_ih,
                                   args.w_hh, args.b_ih, args.b_hh};
  const auto grad = [&](int i) {
    return needed[i] && inputs[i] ? at::empty_symint(inputs[i]->sym_sizes(), inputs[i]->options())
                                  : Tensor();
  };
  return {grad(0), grad(1), grad(2), grad(3), grad(4), grad(5), grad(6)};
}

Tensor weight_mask_meta(const Tensor& seed, c10::SymIntArrayRef size, double p,
                        at::ScalarType dtype) {
  check_weight_mask(seed, p, "p");
  return at::empty_symint(size, seed.options().dtype(dtype));
}

}  // namespace

// ---- Through the dispatcher --------------------------------------------------------------------

ForwardResult call_sequence_forward(const SequenceArgs& a, const c10::SymInt& saved_rows,
                                    bool cell_states) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(LSTMX_OP("_sequence_forward"), "")
                             .typed<ForwardFn>();
  return op.call(a.cell, a.x, a.h0, a.c0, a.w_ih, a.w_hh, a.b_ih, a.b_hh, a.batch_sizes, a.reverse,
                 a.seed, a.weight_dropout, saved_rows, cell_states);
}

BackwardResult call_sequence_backward(const SequenceArgs& a, const OutputGrads& grads,
                                      const Tensor& y, const Tensor& c, const Tensor& saved,
                                      std::array<bool, kInputs> needed) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(LSTMX_OP("_sequence_backward"), "")
                             .typed<BackwardFn>();
  return op.call(grads[0], grads[1], grads[2], grads[3], a.cell, a.x, a.h0, a.c0, a.w_ih, a.w_hh,
                 a.b_ih, a.b_hh, a.batch_sizes, a.reverse, a.seed, a.weight_dropout, y, c, saved,
                 needed);
}

Tensor call_weight_mask(const Tensor& seed, c10::SymIntArrayRef size, double p,
                        at::ScalarType dtype) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow(LSTMX_OP("weight_mask"), "")
          .typed<Tensor(const Tensor&, c10::SymIntArrayRef, double, at::ScalarType)>();
  return op.call(seed, size, p, dtype);
}

LSTMX_DEFINE_LIBRARY(m) {
  m.def(
      "lstm_sequence(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih=None, Tensor? b_hh=None, *, Tensor? batch_sizes=None, bool reverse=False, "
      "Tensor? seed=None, float weight_dropout=0.0, str memory='high', bool cell_states=False) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor c)");
  m.def(
      "gru_sequence(Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih=None, Tensor? b_hh=None, *, Tensor? batch_sizes=None, bool reverse=False, "
      "Tensor? seed=None, float weight_dropout=0.0, str memory='high') -> (Tensor y, Tensor h_n)");
  m.def("weight_mask(Tensor seed, SymInt[] size, float p, *, ScalarType dtype=float) -> Tensor");
  m.def(
      "_sequence_forward(str cell, Tensor x, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, Tensor? batch_sizes, bool reverse, Tensor? seed, "
      "float weight_dropout, SymInt saved_rows, bool cell_states) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor saved)");
  m.def(
      "_sequence_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, str cell, Tensor x, "
      "Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? batch_sizes, bool reverse, Tensor? seed, float weight_dropout, Tensor y, Tensor c, "
      "Tensor saved, bool[7] needed) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, "
      "Tensor dw_hh, Tensor db_ih, Tensor db_hh)");
}

LSTMX_IMPLEMENT(CompositeExplicitAutograd, m) {
  m.impl("lstm_sequence", lstm_sequence<without_autograd>);
  m.impl("gru_sequence", gru_sequence<without_autograd>);
}

LSTMX_IMPLEMENT(Autograd, m) {
  m.impl("lstm_sequence", lstm_sequence<sequence_autograd>);
  m.impl("gru_sequence", gru_sequence<sequence_autograd>);
  m.impl("_sequence_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_sequence_backward", torch::autograd::autogradNotImplementedFallback());
}

LSTMX_IMPLEMENT(FuncTorchBatched, m) {
  m.impl("lstm_sequence", lstm_sequence<by_composite>);
  m.impl("gru_sequence", gru_sequence<by_composite>);
  m.impl("weight_mask", weight_mask_composite);
}

LSTMX_IMPLEMENT(AutocastCPU, m) {
  m.impl("lstm_sequence", lstm_sequence<by_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>>);
  m.impl("gru_sequence", gru_sequence<by_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>>);
}

LSTMX_IMPLEMENT(AutocastCUDA, m) {
  m.impl("lstm_sequence", lstm_sequence<by_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>>);
  m.impl("gru_sequence", gru_sequence<by_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>>);
}

#if !defined(LSTMX_WITH_CUDA)
LSTMX_IMPLEMENT(CUDA, m) {
  for (const char* op : {"_sequence_forward", "_sequence_backward", "weight_mask"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  }
}
#endif

LSTMX_IMPLEMENT(Meta, m) {
  m.impl("_sequence_forward", sequence_forward<sequence_forward_meta>);
  m.impl("_sequence_backward", sequence_backward<sequence_backward_meta>);
  m.impl("weight_mask", weight_mask_meta);
}

}  // namespace lstmx
