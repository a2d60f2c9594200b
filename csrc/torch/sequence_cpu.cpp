// The sequence on the CPU: the recurrence by the kernels of csrc/cpu, everything that concerns all
// steps at once by one ATen GEMM.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include "../cpu/kernels.h"
#include "sequence.h"

namespace lstmx {
namespace {

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

const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(t->contiguous()) : std::nullopt;
}

// The arguments as the kernels want them: dense, with every size at hand.
struct Prepared {
  explicit Prepared(const SequenceArgs& args)
      : x((args.check(), args.x.contiguous())),
        w_ih(args.w_ih),
        w_hh(args.w_hh.contiguous()),
        b_ih(contiguous(args.b_ih)),
        b_hh(contiguous(args.b_hh)),
        batch_sizes(contiguous(args.batch_sizes)),
        seed(args.seed),
        compute(at::toOpMathType(x.scalar_type())),
        H(w_hh.size(1)),
        B(args.h0.size(0)),
        N(args.batch_sizes ? x.size(0) : x.size(0) * B),
        threads(at::get_num_threads()) {
    shape = {args.check_batch_sizes(), B, H,
             batch_sizes ? batch_sizes->const_data_ptr<int64_t>() : nullptr, args.reverse};
    initial[0] = args.h0.contiguous();
    if (args.c0) initial[1] = args.c0->contiguous();
    if (args.masked()) dropout = {seed->const_data_ptr<int64_t>(), args.weight_dropout};
    with_cell(args.cell, [&](auto cell) {
      using Cell = decltype(cell);
      constexpr auto kind = std::is_same_v<Cell, Lstm> ? cpu::CellKind::kLstm : cpu::CellKind::kGru;
      kernels = &cpu::kernels().cells[int(kind)][int(dtype_of(x))];
      G = Cell::kGates, states = Cell::kStates, saved = Cell::kSaved, grads = Cell::kGrads;
      input_grads = Cell::kInputGrads, hidden_grads = Cell::kHiddenGrads;
      input_rotation = Cell::kInputRotation;
    });
  }

  Tensor empty(at::IntArrayRef size) const { return at::empty(size, x.options()); }
  Tensor empty_compute(at::IntArrayRef size) const {
    return at::empty(size, x.options().dtype(compute));
  }
  Tensor workspace(int64_t (*bytes)(const SequenceShape&, int)) const {
    return at::empty({bytes(shape, threads)}, x.options().dtype(at::kByte));
  }
  // y and c have the leading dimensions of x.
  std::vector<int64_t> output_size() const {
    return batch_sizes ? std::vector<int64_t>{N, H} : std::vector<int64_t>{shape.steps, B, H};
  }
  Tensor x_rows() const { return x.view({N, x.size(-1)}); }

  // out = a b, times the mask if one is given: out is compute, or a is and the rest is storage.
  void product(const Tensor& a, const Tensor& b, const Tensor& out,
               const WeightDropout& mask = {}) const {
    const auto& table = cpu::kernels();
    const auto& kernel = a.scalar_type() == b.scalar_type()
                             ? table.storage_product[int(dtype_of(b))]
                             : table.compute_product[int(dtype_of(b))];
    cpu::ProductParams p{a.size(0),
                         b.size(1),
                         a.size(1),
                         a.const_data_ptr(),
                         a.stride(0),
                         a.stride(1),
                         b.const_data_ptr(),
                         b.stride(0),
                         b.stride(1),
                         out.mutable_data_ptr(),
                         out.stride(0),
                         mask,
                         nullptr};
    // So few rows do not pay for packing b.
    if (p.m < 16 && !mask.seed) {
      out.copy_(at::mm(a.to(compute), b.to(compute)));
      return;
    }
    const auto scratch = at::empty({kernel.workspace(p, threads)}, x.options().dtype(at::kByte));
    p.workspace = scratch.mutable_data_ptr();
    kernel.run(p, threads);
  }

  Tensor x, w_ih, w_hh;
  OptionalTensor b_ih, b_hh, batch_sizes, seed;
  at::ScalarType compute;
  int64_t H, B, N;
  int threads;
  SequenceShape shape;
  Tensor initial[kMaxStates];
  WeightDropout dropout{nullptr, 0};
  const cpu::CellKernels* kernels;
  int64_t G, states, saved, grads, input_grads, hidden_grads, input_rotation;
};

// [N, H]: what each row's step had as its h_{t-1}.
Tensor previous_hidden(const Prepared& in, const Tensor& y) {
  const auto& shape = in.shape;
  const auto rows = y.view({in.N, in.H});
  if (!shape.batch_sizes) {
    const auto inner =
        shape.reverse ? rows.narrow(0, in.B, in.N - in.B) : rows.narrow(0, 0, in.N - in.B);
    return shape.reverse ? at::cat({inner, in.initial[0]}) : at::cat({in.initial[0], inner});
  }
  std::vector<Tensor> pieces;
  for (int64_t t = 0, offset = 0; t < shape.steps; ++t) {
    const int64_t count = shape.batch_sizes[t];
    const int64_t other = shape.reverse ? (t + 1 < shape.steps ? shape.batch_sizes[t + 1] : 0)
                                        : (t > 0 ? shape.batch_sizes[t - 1] : 0);
    const int64_t from = shape.reverse ? offset + count : offset - other;
    const int64_t known = std::min(count, other);
    if (known > 0) pieces.push_back(rows.narrow(0, from, known));
    if (known < count) pieces.push_back(in.initial[0].narrow(0, known, count - known));
    offset += count;
  }
  return at::cat(pieces);
}

// The gates, from the states alone: one GEMM for each half.
Tensor recompute_gates(const Prepared& in, const Tensor& y, const Tensor& c, const Tensor& h_prev) {
  auto saved = in.empty({in.N, in.saved, in.H});
  auto h = h_prev, w_hh = in.w_hh;
  if (in.dropout.seed) {
    // As in forward, the masked weight is not rounded.
    h = h.to(in.compute);
    w_hh = w_hh * weight_mask_cpu(*in.seed, w_hh.sizes(), in.dropout.p, in.compute);
  }
  const auto x_gates = in.empty_compute({in.N, in.G * in.H});
  const auto h_gates = in.empty_compute({in.N, in.G * in.H});
  in.product(in.x_rows(), in.w_ih.t(), x_gates);
  in.product(h, w_hh.t(), h_gates);
  RecomputeParams p{};
  p.shape = in.shape;
  p.x_gates = x_gates.const_data_ptr();
  p.h_gates = h_gates.const_data_ptr();
  p.b_ih = data_or_null(in.b_ih);
  p.b_hh = data_or_null(in.b_hh);
  const Tensor* states[] = {&y, &c};
  for (int k = 0; k < in.states; ++k) {
    p.initial[k] = in.initial[k].const_data_ptr();
    p.states[k] = states[k]->const_data_ptr();
  }
  p.saved = saved.mutable_data_ptr();
  in.kernels->recompute(p, in.threads);
  return saved;
}

}  // namespace

ForwardResult sequence_forward_cpu(const SequenceArgs& args, bool save_gates, bool cell_states) {
  const Prepared in(args);
  const bool keep_c = in.states > 1 && cell_states;
  auto y = in.empty(in.output_size());
  auto c = keep_c ? in.empty(in.output_size()) : in.empty({0});
  Tensor last[] = {in.empty({in.B, in.H}), in.states > 1 ? in.empty({in.B, in.H}) : in.empty({0})};
  auto saved = save_gates ? in.empty({in.N, in.saved, in.H}) : in.empty({0});

  // x W_ih^T goes where the activated gates will be, if they are kept in the same dtype.
  auto x_gates = save_gates && in.compute == in.x.scalar_type()
                     ? saved.view({in.N, in.saved * in.H}).narrow(1, 0, in.G * in.H)
                     : in.empty_compute({in.N, in.G * in.H});
  in.product(in.x_rows(), in.w_ih.t(), x_gates);

  const auto workspace = in.workspace(in.kernels->forward_workspace);
  SequenceForwardParams p{};
  p.shape = in.shape;
  p.dropout = in.dropout;
  p.x_gates = x_gates.const_data_ptr();
  p.x_gates_stride = x_gates.stride(0);
  p.w_hh = in.w_hh.const_data_ptr();
  p.b_ih = data_or_null(in.b_ih);
  p.b_hh = data_or_null(in.b_hh);
  for (int k = 0; k < in.states; ++k) {
    p.initial[k] = in.initial[k].const_data_ptr();
    p.last[k] = last[k].mutable_data_ptr();
  }
  p.states[0] = y.mutable_data_ptr();
  p.states[1] = keep_c ? c.mutable_data_ptr() : nullptr;
  p.saved = save_gates ? saved.mutable_data_ptr() : nullptr;
  p.workspace = workspace.mutable_data_ptr();
  in.kernels->forward(p, in.threads);
  return {y, last[0], last[1], c, saved};
}

BackwardResult sequence_backward_cpu(const SequenceArgs& args, const OutputGrads& grads,
                                     const Tensor& y_, const Tensor& c_, const Tensor& saved_,
                                     std::array<bool, kInputs> needed) {
  const Prepared in(args);
  const auto [need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh] = needed;
  const auto y = y_.contiguous(), c = c_.contiguous();
  const bool recompute = saved_.numel() == 0 && in.N > 0;
  Tensor h_prev;
  if (recompute || need_w_hh) h_prev = previous_hidden(in, y);
  const auto saved = recompute ? recompute_gates(in, y, c, h_prev) : saved_.contiguous();

  auto dgates = in.empty_compute({in.N, in.grads * in.H});
  auto dbias = in.empty_compute({in.grads * in.H});
  Tensor dinitial[kMaxStates];
  const auto workspace = in.workspace(in.kernels->backward_workspace);
  SequenceBackwardParams p{};
  p.shape = in.shape;
  p.dropout = in.dropout;
  p.w_hh = in.w_hh.const_data_ptr();
  const Tensor* states[] = {&y, &c};
  const OptionalTensor dstates[] = {contiguous(grads[0]), contiguous(grads[3])};
  const OptionalTensor dlast[] = {contiguous(grads[1]), contiguous(grads[2])};
  for (int k = 0; k < in.states; ++k) {
    dinitial[k] = in.empty({in.B, in.H});
    p.initial[k] = in.initial[k].const_data_ptr();
    p.states[k] = states[k]->const_data_ptr();
    p.dstates[k] = data_or_null(dstates[k]);
    p.dlast[k] = data_or_null(dlast[k]);
    p.dinitial[k] = dinitial[k].mutable_data_ptr();
  }
  p.saved = saved.const_data_ptr();
  p.dgates = dgates.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  p.workspace = workspace.mutable_data_ptr();
  in.kernels->backward(p, in.threads);

  // The input's gradients come in the cell's own order of gates; see kInputRotation.
  const auto rotate = [&](const Tensor& t, int64_t by) {
    return in.input_rotation == 0 ? t : at::roll(t, by * in.input_rotation * in.H, 0);
  };
  const auto storage = in.x.scalar_type();
  const auto dgates_x = dgates.narrow(1, in.input_grads * in.H, in.G * in.H);
  const auto dgates_h = dgates.narrow(1, in.hidden_grads * in.H, in.G * in.H);
  Tensor dx, dw_ih, dw_hh, db_ih, db_hh;
  if (need_x) {
    dx = in.empty(in.x.sizes());
    in.product(dgates_x, rotate(in.w_ih, 1), dx.view({in.N, in.x.size(-1)}));
  }
  if (need_w_ih) {
    dw_ih = in.empty(in.w_ih.sizes());
    in.product(dgates_x.t(), in.x_rows(), dw_ih);
    dw_ih = rotate(dw_ih, -1);
  }
  if (need_w_hh) {
    dw_hh = in.empty(in.w_hh.sizes());
    in.product(dgates_h.t(), h_prev, dw_hh, in.dropout);
  }
  if (need_b_ih) {
    const auto part = dbias.narrow(0, in.input_grads * in.H, in.G * in.H);
    db_ih = rotate(part, -1).to(storage, /*non_blocking=*/false, /*copy=*/true);
  }
  if (need_b_hh) {
    const auto part = dbias.narrow(0, in.hidden_grads * in.H, in.G * in.H);
    db_hh = part.to(storage, /*non_blocking=*/false, /*copy=*/true);
  }
  return {
      dx,   need_h0 ? dinitial[0] : Tensor(), need_c0 ? dinitial[1] : Tensor(), dw_ih, dw_hh, db_ih,
      db_hh};
}

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

}  // namespace lstmx
