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

  // out = a b; `more` says what else ProductParams offers.
  void product(const cpu::ProductKernel& kernel, const Tensor& a, const Tensor& b,
               const Tensor& out, const cpu::ProductParams& more = {}) const {
    cpu::ProductParams p = more;
    p.m = a.size(0), p.n = b.size(1), p.k = a.size(1);
    p.a = a.const_data_ptr(), p.a_row = a.stride(0), p.a_column = a.stride(1);
    p.b = b.const_data_ptr(), p.b_row = b.stride(0), p.b_column = b.stride(1);
    p.c = out.mutable_data_ptr(), p.c_row = out.stride(0);
    const auto scratch = empty_cached({kernel.workspace(p, threads)}, x.options().dtype(at::kByte));
    p.workspace = scratch.mutable_data_ptr();
    kernel.run(p, threads);
  }

  // rows W^T in compute, as the gates want it; and W_hh's, whose mask is not rounded with it.
  Tensor gates(const Tensor& rows, const Tensor& w) const {
    auto out = empty_compute({rows.size(0), G * H});
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

// Backward goes through the steps in chunks: the gradients of the gates, and the gates themselves
// if they are computed again, need memory for one chunk only.
class Backward {
 public:
  Backward(const CpuInputs& in, const OutputGrads& grads, const Tensor& y, const Tensor& c,
           const Tensor& saved, const std::array<bool, kInputs>& needed)
      : in_(in),
        states_{y.contiguous(), c.contiguous()},
        saved_(saved.contiguous()),
        recompute_(saved.numel() == 0 && in.N > 0),
        chunks_(chunks()),
        need_x_(needed[0]),
        need_initial_{needed[1], needed[2]},
        need_w_ih_(needed[3]),
        need_w_hh_(needed[4]) {
    dstates_[0] = contiguous(grads[0]), dlast_[0] = contiguous(grads[1]);
    dlast_[1] = contiguous(grads[2]), dstates_[1] = contiguous(grads[3]);
    // Sums over several chunks are kept in the type that they are computed in.
    const auto sum = [&](const Tensor& w) {
      return chunks_ > 1 ? in.empty_compute(w.sizes()) : in.empty(w.sizes());
    };
    if (need_x_) dx_ = in.empty(in.x.sizes());
    if (need_w_ih_) dw_ih_ = sum(in.w_ih);
    if (need_w_hh_) dw_hh_ = sum(in.w_hh);
  }

  BackwardResult run(bool need_b_ih, bool need_b_hh) {
    workspace_ = in_.workspace(in_.cell.backward_workspace, in_.shape);
    const int64_t T = in_.shape.steps;
    for (int64_t i = 0; i < chunks_; ++i) {
      const int64_t place = in_.shape.reverse ? i : chunks_ - 1 - i;
      chunk(T * place / chunks_, T * (place + 1) / chunks_, i);
    }
    const auto dtype = in_.x.scalar_type();
    if (need_w_ih_) dw_ih_ = dw_ih_.to(dtype);
    if (need_w_hh_) dw_hh_ = dw_hh_.to(dtype);
    Tensor db_ih, db_hh;
    if (need_b_ih || need_b_hh) {
      std::tie(db_ih, db_hh) = in_.bias_grads(dbias_.view({in_.grads, in_.H}));
    }
    return {dx_,
            need_initial_[0] ? carry_[0] : Tensor(),
            need_initial_[1] ? carry_[1] : Tensor(),
            dw_ih_,
            dw_hh_,
            need_b_ih ? db_ih : Tensor(),
            need_b_hh ? db_hh : Tensor()};
  }

 private:
  // A few, of so many rows that what is done once for each does not count.
  int64_t chunks() const {
    if (in_.shape.batch_sizes || in_.B == 0) return 1;
    const int64_t row_bytes = in_.grads * in_.H * int64_t(c10::elementSize(in_.compute));
    const int64_t least = recompute_ ? 256 : std::max<int64_t>(512, (4 << 20) / row_bytes);
    return std::clamp<int64_t>(in_.N / least, 1,
                               std::min<int64_t>(in_.shape.steps, recompute_ ? 8 : 4));
  }

  // Steps [begin, end), after the later ones if i > 0.
  void chunk(int64_t begin, int64_t end, int64_t i) {
    const int64_t B = in_.B, H = in_.H;
    const bool whole = chunks_ == 1;
    const int64_t first = whole ? 0 : begin * B, count = whole ? in_.N : (end - begin) * B;
    const bool at_start = in_.shape.reverse ? end == in_.shape.steps : begin == 0;
    const auto rows = [&](const Tensor& t) {
      return t.view({in_.N, in_.N > 0 ? t.numel() / in_.N : t.size(-1)}).narrow(0, first, count);
    };

    SequenceBackwardParams p{};
    p.shape = in_.shape;
    if (!whole) p.shape.steps = end - begin;
    const auto h_prev = recompute_ || need_w_hh_ ? previous(begin, end, at_start) : Tensor();
    const auto saved =
        recompute_ ? gates(h_prev, p.shape, first, count, at_start, begin, end) : rows(saved_);
    auto dgates = in_.kernels.dgates_in_storage ? in_.empty({count, in_.grads * H})
                                                : in_.empty_compute({count, in_.grads * H});
    auto dbias = in_.empty_compute({in_.grads * H});
    p.dropout = in_.dropout;
    const bool one_step = in_.shape.steps == 1;  // it does not pay for packing W_hh
    p.w_hh = one_step ? nullptr : in_.w_hh.const_data_ptr();
    Tensor dinitial[kMaxStates];
    std::vector<Tensor> kept;  // what p points to
    for (int k = 0; k < in_.states; ++k) {
      if (!at_start || need_initial_[k]) dinitial[k] = in_.empty({B, H});
      kept.push_back(initial(k, begin, end, at_start));
      p.initial[k] = kept.back().const_data_ptr();
      p.states[k] = rows(states_[k]).const_data_ptr();
      p.dstates[k] = dstates_[k] ? rows(*dstates_[k]).const_data_ptr() : nullptr;
      p.dlast[k] = i == 0 ? data_or_null(dlast_[k]) : carry_[k].const_data_ptr();
      p.dinitial[k] = dinitial[k].defined() ? dinitial[k].mutable_data_ptr() : nullptr;
    }
    p.saved = saved.const_data_ptr();
    p.dgates = dgates.mutable_data_ptr();
    p.dbias = dbias.mutable_data_ptr();
    p.workspace = workspace_.mutable_data_ptr();
    p.packed = i > 0;
    in_.cell.backward(p, in_.threads);
    if (i + 1 == chunks_) workspace_ = Tensor();  // the products have their own
    for (int k = 0; k < in_.states; ++k) carry_[k] = dinitial[k];
    dbias_ = i == 0 ? dbias : dbias_.add_(dbias);

    // The input's gradients come in the cell's own order of gates; see kInputRotation.
    const auto dgates_x = dgates.narrow(1, in_.input_grads * H, in_.G * H);
    const auto dgates_h = dgates.narrow(1, in_.hidden_grads * H, in_.G * H);
    cpu::ProductParams rotated{};
    rotated.b_rotation = rotated.c_rotation = (in_.G - in_.input_rotation) % in_.G * H;
    if (one_step && need_initial_[0]) {
      auto through_w_hh = in_.empty({B, H});
      in_.product(in_.kernels.grads, dgates_h, in_.dropout.seed ? in_.kept_w_hh() : in_.w_hh,
                  through_w_hh);
      carry_[0].add_(through_w_hh, in_.dropout.seed ? in_.scale() : 1.0);
    }
    if (need_x_) {
      cpu::ProductParams more = rotated;
      more.c_rotation = 0;
      in_.product(in_.kernels.grads, dgates_x, in_.w_ih, rows(dx_), more);
    }
    const auto& kernel = whole ? in_.kernels.grads : in_.kernels.sums;
    if (need_w_ih_) {
      cpu::ProductParams more = rotated;
      more.b_rotation = 0, more.accumulate = i > 0;
      in_.product(kernel, dgates_x.t(), rows(in_.x), dw_ih_, more);
    }
    if (need_w_hh_) {
      cpu::ProductParams more{};
      more.dropout = in_.dropout, more.accumulate = i > 0;
      in_.product(kernel, dgates_h.t(), h_prev, dw_hh_, more);
    }
  }

  // The state that the first of the chunk's steps found.
  Tensor initial(int k, int64_t begin, int64_t end, bool at_start) const {
    if (at_start) return in_.initial[k];
    const int64_t step = in_.shape.reverse ? end : begin - 1;
    return states_[k].view({in_.N, in_.H}).narrow(0, step * in_.B, in_.B);
  }

  // The output that each row of the chunk found.
  Tensor previous(int64_t begin, int64_t end, bool at_start) const {
    if (chunks_ == 1) return in_.previous(0, states_[0]);
    const int64_t B = in_.B, inner = (end - begin - (at_start ? 1 : 0)) * B;
    const auto y = states_[0].view({in_.N, in_.H});
    if (in_.shape.reverse) {
      const auto later = y.narrow(0, (begin + 1) * B, inner);
      return at_start ? at::cat({later, in_.initial[0]}) : later;
    }
    const auto earlier = y.narrow(0, at_start ? 0 : (begin - 1) * B, inner);
    return at_start ? at::cat({in_.initial[0], earlier}) : earlier;
  }

  // The chunk's gates, from the states alone: one product for each half.
  Tensor gates(const Tensor& h_prev, const SequenceShape& shape, int64_t first, int64_t count,
               bool at_start, int64_t begin, int64_t end) const {
    auto saved = in_.empty({count, in_.saved * in_.H});
    const auto x_gates = in_.gates(in_.x_rows().narrow(0, first, count), in_.w_ih);
    const auto h_gates = in_.hidden_gates(h_prev);
    auto p = pointwise_params(in_, x_gates, h_gates);
    p.shape = shape;
    std::vector<Tensor> kept;  // what p points to
    for (int k = 0; k < in_.states; ++k) {
      kept.push_back(initial(k, begin, end, at_start));
      p.initial[k] = kept.back().const_data_ptr();
      p.states[k] = states_[k].view({in_.N, -1}).narrow(0, first, count).const_data_ptr();
    }
    p.saved = saved.mutable_data_ptr();
    in_.cell.pointwise(p, in_.threads);
    return saved;
  }

  const CpuInputs& in_;
  const Tensor states_[kMaxStates];  // y, c
  const Tensor saved_;
  const bool recompute_;
  const int64_t chunks_;
  const bool need_x_, need_initial_[kMaxStates], need_w_ih_, need_w_hh_;
  OptionalTensor dstates_[kMaxStates], dlast_[kMaxStates];
  Tensor workspace_, carry_[kMaxStates];  // gradients of the states between two chunks
  Tensor dx_, dw_ih_, dw_hh_, dbias_;
};

BackwardResult sequence_backward_cpu(const SequenceArgs& args, const OutputGrads& grads,
                                     const Tensor& y, const Tensor& c, const Tensor& saved,
                                     std::array<bool, kInputs> needed) {
  const CpuInputs in(args);
  return Backward(in, grads, y, c, saved, needed).run(needed[5], needed[6]);
}

}  // namespace

LSTMX_IMPLEMENT(CPU, m) {
  m.impl("_sequence_forward", sequence_forward<sequence_forward_cpu>);
  m.impl("_sequence_backward", sequence_backward<sequence_backward_cpu>);
  m.impl("weight_mask", weight_mask_cpu);
}

}  // namespace lstmx
