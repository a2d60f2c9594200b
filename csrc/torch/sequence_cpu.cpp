// The sequence on the CPU: the recurrence by the kernels of csrc/cpu, everything that concerns all
// steps at once by one product.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include "../cpu/kernels.h"
#include "../cpu/team.h"
#include "inputs.h"
#include "matrix_unit.h"
#include "ops.h"

namespace lstmx {
namespace {

struct CpuInputs : Inputs {
  explicit CpuInputs(const SequenceArgs& args)
      : Inputs(args),
        threads(at::get_num_threads()),
        kernels(cpu::kernels(dtype, multiply_in_pairs())),
        cell(kernels.cells[int(kind)]) {}

  Tensor workspace(int64_t (*bytes)(const SequenceShape&, int), const SequenceShape& of) const {
    return empty_cached({bytes(of, threads)}, x.options().dtype(at::kByte));
  }
  Tensor empty_dgates() const {
    return kernels.dgates_in_storage ? empty({N, grads * H}) : empty_compute({N, grads * H});
  }

  // out = a b, times the mask if one is given; b or out may be rotated.
  void product(const cpu::ProductKernel& kernel, const Tensor& a, const Tensor& b,
               const Tensor& out, const WeightDropout& mask = {}, int64_t b_rotation = 0,
               int64_t out_rotation = 0) const {
    cpu::ProductParams p{};
    p.m = a.size(0), p.n = b.size(1), p.k = a.size(1);
    p.a = a.const_data_ptr(), p.a_row = a.stride(0), p.a_column = a.stride(1);
    p.b = b.const_data_ptr(), p.b_row = b.stride(0), p.b_column = b.stride(1);
    p.c = out.mutable_data_ptr(), p.c_row = out.stride(0);
    p.b_rotation = b_rotation, p.c_rotation = out_rotation;
    p.dropout = mask;
    const auto scratch = empty_cached({kernel.workspace(p, threads)}, x.options().dtype(at::kByte));
    p.workspace = scratch.mutable_data_ptr();
    kernel.run(p, threads);
  }

  // rows W^T in compute, as the gates want it; and W_hh's, whose mask is not rounded with it.
  Tensor gates(const Tensor& rows, const Tensor& w) const {
    auto out = empty_compute({N, G * H});
    product(kernels.gates, rows, w.t(), out);
    return out;
  }
  Tensor hidden_gates(const Tensor& h_prev) const {
    if (!dropout.seed) return gates(h_prev, w_hh);
    return gates(h_prev, kept_w_hh()).mul_(scale());
  }

  // W_hh with zeros where it is dropped, not scaled.
  Tensor kept_w_hh() const;
  double scale() const { return dropout.p < 1 ? 1 / (1 - dropout.p) : 0; }

  int threads;
  const cpu::Kernels& kernels;
  const cpu::CellKernels& cell;
  FollowTeams follow_teams;  // after `threads`, which is to be what the user asked for
};

Tensor weight_mask_cpu(const Tensor& seed, at::IntArrayRef size, double p, at::ScalarType dtype) {
  check_weight_mask(seed, p, "p");
  auto mask = at::empty(size, seed.options().dtype(at::toOpMathType(dtype)));
  const WeightDropout dropout = {seed.const_data_ptr<int64_t>(), p};
  at::parallel_for(0, mask.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    if (mask.scalar_type() == at::kDouble) {
      cpu::kernels().mask_double(dropout, begin, end, mask.mutable_data_ptr<double>() + begin);
    } else {
      cpu::kernels().mask_float(dropout, begin, end, mask.mutable_data_ptr<float>() + begin);
    }
  });
  return mask.to(dtype);
}

Tensor CpuInputs::kept_w_hh() const {
  const auto mask = weight_mask_cpu(*seed, w_hh.sizes(), dropout.p, w_hh.scalar_type());
  return w_hh * mask.sign_();
}

// The cell for all steps at once, given what each step found as h.
PointwiseParams pointwise_params(const CpuInputs& in, const Tensor& x_gates,
                                 const Tensor& h_gates) {
  PointwiseParams p{};
  p.shape = in.shape;
  p.x_gates = x_gates.const_data_ptr();
  p.h_gates = h_gates.const_data_ptr();
  p.b_ih = data_or_null(in.b_ih);
  p.b_hh = data_or_null(in.b_hh);
  for (int k = 0; k < in.states; ++k) p.initial[k] = in.initial[k].const_data_ptr();
  return p;
}

// The gates, from the states alone: one product for each half.
Tensor recompute_gates(const CpuInputs& in, const Tensor& y, const Tensor& c,
                       const Tensor& h_prev) {
  auto saved = in.empty({in.N, in.saved, in.H});
  const auto x_gates = in.gates(in.x_rows(), in.w_ih), h_gates = in.hidden_gates(h_prev);
  auto p = pointwise_params(in, x_gates, h_gates);
  const Tensor* states[] = {&y, &c};
  for (int k = 0; k < in.states; ++k) p.states[k] = states[k]->const_data_ptr();
  p.saved = saved.mutable_data_ptr();
  in.cell.pointwise(p, in.threads);
  return saved;
}

ForwardResult sequence_forward_cpu(const SequenceArgs& args, bool save_gates, bool cell_states) {
  const CpuInputs in(args);
  const bool keep_c = in.states > 1 && cell_states;
  auto y = in.empty(in.output_size());
  auto c = keep_c ? in.empty(in.output_size()) : in.empty({0});
  Tensor last[] = {in.empty({in.B, in.H}), in.states > 1 ? in.empty({in.B, in.H}) : in.empty({0})};
  auto saved = save_gates ? in.empty({in.N, in.saved, in.H}) : in.empty({0});
  void* const states[] = {y.mutable_data_ptr(), keep_c ? c.mutable_data_ptr() : nullptr};
  void* const saved_data = save_gates ? saved.mutable_data_ptr() : nullptr;

  // One step does not pay for packing W_hh.
  if (in.shape.steps == 1) {
    const auto x_gates = in.gates(in.x_rows(), in.w_ih);
    const auto h_gates = in.hidden_gates(in.initial[0]);
    auto p = pointwise_params(in, x_gates, h_gates);
    for (int k = 0; k < in.states; ++k) {
      p.next[k] = states[k], p.last[k] = last[k].mutable_data_ptr();
    }
    p.saved = saved_data;
    in.cell.pointwise(p, in.threads);
    return {y, last[0], last[1], c, saved};
  }

  SequenceForwardParams p{};
  p.shape = in.shape;
  Tensor x_gates;
  if (in.cell.fuses_input(in.shape, in.x.size(-1), in.threads)) {
    p.shape.inputs = in.x.size(-1);
    p.x = in.x.const_data_ptr();
    p.w_ih = in.w_ih.const_data_ptr();
  } else {
    // x W_ih^T goes where the activated gates will be, if they are kept in the same dtype.
    x_gates = save_gates && in.compute == in.x.scalar_type()
                  ? saved.view({in.N, in.saved * in.H}).narrow(1, 0, in.G * in.H)
                  : in.empty_compute({in.N, in.G * in.H});
    in.product(in.kernels.gates, in.x_rows(), in.w_ih.t(), x_gates);
    p.x_gates = x_gates.const_data_ptr();
    p.x_gates_stride = x_gates.stride(0);
  }
  const auto workspace = in.workspace(in.cell.forward_workspace, p.shape);
  p.dropout = in.dropout;
  p.w_hh = in.w_hh.const_data_ptr();
  p.b_ih = data_or_null(in.b_ih);
  p.b_hh = data_or_null(in.b_hh);
  for (int k = 0; k < in.states; ++k) {
    p.initial[k] = in.initial[k].const_data_ptr();
    p.last[k] = last[k].mutable_data_ptr();
    p.states[k] = states[k];
  }
  p.saved = saved_data;
  p.workspace = workspace.mutable_data_ptr();
  in.cell.forward(p, in.threads);
  return {y, last[0], last[1], c, saved};
}

BackwardResult sequence_backward_cpu(const SequenceArgs& args, const OutputGrads& grads,
                                     const Tensor& y_, const Tensor& c_, const Tensor& saved_,
                                     std::array<bool, kInputs> needed) {
  const CpuInputs in(args);
  const auto [need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh] = needed;
  const auto y = y_.contiguous(), c = c_.contiguous();
  const bool recompute = saved_.numel() == 0 && in.N > 0;
  Tensor h_prev;
  if (recompute || need_w_hh) h_prev = in.previous(0, y);
  const auto saved = recompute ? recompute_gates(in, y, c, h_prev) : saved_.contiguous();

  auto dgates = in.empty_dgates();
  auto dbias = in.empty_compute({in.grads * in.H});
  Tensor dinitial[kMaxStates];
  const auto workspace = in.workspace(in.cell.backward_workspace, in.shape);
  SequenceBackwardParams p{};
  p.shape = in.shape;
  p.dropout = in.dropout;
  const bool one_step = in.shape.steps == 1;  // it does not pay for packing W_hh
  p.w_hh = one_step ? nullptr : in.w_hh.const_data_ptr();
  const Tensor* states[] = {&y, &c};
  const bool need_initial[] = {need_h0, need_c0};
  const OptionalTensor dstates[] = {contiguous(grads[0]), contiguous(grads[3])};
  const OptionalTensor dlast[] = {contiguous(grads[1]), contiguous(grads[2])};
  for (int k = 0; k < in.states; ++k) {
    if (need_initial[k]) dinitial[k] = in.empty({in.B, in.H});
    p.initial[k] = in.initial[k].const_data_ptr();
    p.states[k] = states[k]->const_data_ptr();
    p.dstates[k] = data_or_null(dstates[k]);
    p.dlast[k] = data_or_null(dlast[k]);
    p.dinitial[k] = need_initial[k] ? dinitial[k].mutable_data_ptr() : nullptr;
  }
  p.saved = saved.const_data_ptr();
  p.dgates = dgates.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  p.workspace = workspace.mutable_data_ptr();
  in.cell.backward(p, in.threads);

  // The input's gradients come in the cell's own order of gates; see kInputRotation.
  const int64_t rotation = (in.G - in.input_rotation) % in.G * in.H;
  const auto dgates_x = dgates.narrow(1, in.input_grads * in.H, in.G * in.H);
  const auto dgates_h = dgates.narrow(1, in.hidden_grads * in.H, in.G * in.H);
  Tensor dx, dw_ih, dw_hh, db_ih, db_hh;
  if (one_step && need_h0) {
    auto through_w_hh = in.empty({in.B, in.H});
    in.product(in.kernels.grads, dgates_h, in.dropout.seed ? in.kept_w_hh() : in.w_hh,
               through_w_hh);
    dinitial[0].add_(through_w_hh, in.dropout.seed ? in.scale() : 1.0);
  }
  if (need_x) {
    dx = in.empty(in.x.sizes());
    in.product(in.kernels.grads, dgates_x, in.w_ih, dx.view({in.N, in.x.size(-1)}), {}, rotation);
  }
  if (need_w_ih) {
    dw_ih = in.empty(in.w_ih.sizes());
    in.product(in.kernels.grads, dgates_x.t(), in.x_rows(), dw_ih, {}, 0, rotation);
  }
  if (need_w_hh) {
    dw_hh = in.empty(in.w_hh.sizes());
    in.product(in.kernels.grads, dgates_h.t(), h_prev, dw_hh, in.dropout);
  }
  if (need_b_ih || need_b_hh) {
    std::tie(db_ih, db_hh) = in.bias_grads(dbias.view({in.grads, in.H}));
  }
  return {dx,
          dinitial[0],
          dinitial[1],
          dw_ih,
          dw_hh,
          need_b_ih ? db_ih : Tensor(),
          need_b_hh ? db_hh : Tensor()};
}

}  // namespace

LSTMX_IMPLEMENT(CPU, m) {
  m.impl("_sequence_forward", sequence_forward<sequence_forward_cpu>);
  m.impl("_sequence_backward", sequence_backward<sequence_backward_cpu>);
  m.impl("weight_mask", weight_mask_cpu);
}

}  // namespace lstmx
