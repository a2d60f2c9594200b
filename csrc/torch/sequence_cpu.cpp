// The sequence on the CPU: the recurrence by the kernels of csrc/cpu, everything that concerns all
// steps at once by one product.
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <cstring>

#include "../cpu/kernels.h"
#include "../cpu/matrix_unit.h"
#include "../cpu/team.h"
#include "inputs.h"
#include "ops.h"

namespace lstmx {
namespace {

// A part of a tensor's memory. Of a short call, views that ATen makes would be a good part.
struct Matrix {
  char* data;
  int64_t rows, columns;
  int64_t row, column;  // strides, in elements
  int64_t element;      // bytes

  static Matrix of(const Tensor& t) {
    auto* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    return {data, t.size(0), t.size(1), t.stride(0), t.stride(1), t.element_size()};
  }
  // A dense tensor as so many rows.
  static Matrix of(const Tensor& t, int64_t rows) {
    auto* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    const int64_t columns = rows > 0 ? t.numel() / rows : t.size(-1);
    return {data, rows, columns, columns, 1, t.element_size()};
  }

  Matrix t() const { return {data, columns, rows, column, row, element}; }
  Matrix some_rows(int64_t first, int64_t count) const {
    return {data + first * row * element, count, columns, row, column, element};
  }
  Matrix some_columns(int64_t first, int64_t count) const {
    return t().some_rows(first, count).t();
  }
  bool dense() const { return column == 1 && row == columns; }
};

struct CpuInputs : Inputs {
  explicit CpuInputs(const SequenceArgs& args)
      : Inputs(args),
        threads(at::get_num_threads()),
        kernels(cpu::kernels(dtype, cpu::multiplies_in_pairs())),
        cell(kernels.cells[int(kind)]),
        from_zero(all_zero(initial[0])) {}

  template <class Params>
  Tensor workspace(int64_t (*bytes)(const Params&, int), const Params& p) const {
    return empty_cached({bytes(p, threads)}, x.options().dtype(at::kByte));
  }

  // -0 does not count, NaN and all else end the search. A tensor that is not empty.
  static bool all_zero(const Tensor& t) {
    const auto* bytes = static_cast<const char*>(t.const_data_ptr());
    const size_t count = t.nbytes();
    return count > 0 && bytes[0] == 0 && std::memcmp(bytes, bytes + 1, count - 1) == 0;
  }

  // out = a b; `more` says what else ProductParams offers.
  void product(const cpu::ProductKernel& kernel, const Matrix& a, const Matrix& b,
               const Matrix& out, const cpu::ProductParams& more = {}) const {
    cpu::ProductParams p = more;
    p.m = a.rows, p.n = b.columns, p.k = a.columns;
    p.a = a.data, p.a_row = a.row, p.a_column = a.column;
    p.b = b.data, p.b_row = b.row, p.b_column = b.column;
    p.c = out.data, p.c_row = out.row;
    if (p.k == 0 && !p.accumulate && out.dense()) {
      std::memset(p.c, 0, out.rows * out.columns * out.element);
      return;
    }
    const auto scratch = empty_cached({kernel.workspace(p, threads)}, x.options().dtype(at::kByte));
    p.workspace = scratch.mutable_data_ptr();
    kernel.run(p, threads);
  }

  // rows W^T in compute, as the gates want it; and W_hh's, whose mask is not rounded with it.
  Tensor gates(const Tensor& rows, const Tensor& w) const {
    auto out = empty_compute({rows.size(0), G * H});
    product(kernels.gates, Matrix::of(rows), Matrix::of(w).t(), Matrix::of(out));
    return out;
  }
  Tensor hidden_gates() const {
    if (!dropout.seed) return gates(initial[0], w_hh);
    return gates(initial[0], kept_w_hh()).mul_(scale());
  }

  bool saved_in_compute() const { return compute == x.scalar_type(); }

  // What weight dropout keeps, for the kernels; drawn by the first that asks.
  WeightDropout drawn() const {
    if (!dropout.seed) return {};
    const auto& table = cpu::kernels();
    if (!kept_.defined()) {
      kept_ = empty_cached({table.mask_bytes(w_hh.numel())}, x.options().dtype(at::kByte));
      table.draw_mask(dropout, w_hh.numel(), kept_.mutable_data_ptr<uint8_t>(), threads);
    }
    return {dropout.seed, dropout.p, kept_.const_data_ptr<uint8_t>()};
  }

  // W_hh with zeros where it is dropped, not scaled.
  Tensor kept_w_hh() const;
  double scale() const { return dropout.p < 1 ? 1 / (1 - dropout.p) : 0; }

  int threads;
  const cpu::Kernels& kernels;
  const cpu::CellKernels& cell;
  const bool from_zero;      // the first step finds h = 0: neither it nor dW_hh needs that product
  FollowTeams follow_teams;  // after `threads`, which is to be what the user asked for

 private:
  mutable Tensor kept_;
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

// What both forms of a forward call read and write. `saved` has so many rows of kSaved * H.
template <class Params>
Params forward_params(const CpuInputs& in, const SequenceShape& shape, const Tensor& saved) {
  Params p{};
  p.shape = shape;
  p.b_ih = data_or_null(in.b_ih);
  p.b_hh = data_or_null(in.b_hh);
  for (int k = 0; k < in.states; ++k) p.initial[k] = in.initial[k].const_data_ptr();
  p.saved = saved.numel() > 0 ? saved.mutable_data_ptr() : nullptr;
  p.saved_row = saved.stride(0);
  return p;
}

// T = 1, which does not pay for packing the weights. states, last: null if not wanted.
void forward_one_step(const CpuInputs& in, void* const* states, void* const* last,
                      const Tensor& saved) {
  const auto x_gates = in.gates(in.x_rows(), in.w_ih);
  OptionalTensor h_gates;
  if (!in.from_zero) h_gates = in.hidden_gates();
  auto p = forward_params<StepParams>(in, in.shape, saved);
  p.x_gates = x_gates.const_data_ptr();
  p.h_gates = data_or_null(h_gates);
  for (int k = 0; k < in.states; ++k) p.states[k] = states[k], p.last[k] = last[k];
  in.cell.step(p, in.threads);
}

// The recurrence over some of the rows. `saved` is [rows, kSaved * H], of the last of them.
struct Recurrence {
  // `fused`: whether it had better multiply the input itself. units: how many at once, 0 for all.
  Recurrence(const CpuInputs& in, const SequenceShape& shape, const Tensor& x, const Tensor& saved,
             bool fused, int64_t units = 0)
      : params(forward_params<SequenceForwardParams>(in, shape, saved)) {
    const auto of = SavedRows::make(shape, x.size(0), saved.size(0));
    params.saved_begin = of.begin, params.saved_end = of.end;
    params.unit_end = units;
    if (fused) {
      params.shape.inputs = x.size(1);
      params.x = x.const_data_ptr();
      params.w_ih = in.w_ih.const_data_ptr();
    } else {
      // x W_ih^T goes where the activated gates will be, if they are kept in the same dtype.
      const bool over_saved = saved.size(0) == x.size(0) && in.saved_in_compute();
      x_gates =
          over_saved ? saved.narrow(1, 0, in.G * in.H) : in.empty_compute({x.size(0), in.G * in.H});
      in.product(in.kernels.gates, Matrix::of(x), Matrix::of(in.w_ih).t(), Matrix::of(x_gates));
      params.x_gates = x_gates.const_data_ptr();
      params.x_gates_stride = x_gates.stride(0);
    }
    workspace = in.workspace(in.cell.forward_workspace, params);
    params.dropout = in.drawn();
    params.w_hh = in.w_hh.const_data_ptr();
    params.workspace = workspace.mutable_data_ptr();
  }

  SequenceForwardParams params;
  Tensor x_gates, workspace;  // what params points to
};

ForwardResult sequence_forward_cpu(const SequenceArgs& args, c10::SymInt saved_rows,
                                   bool cell_states) {
  const CpuInputs in(args);
  const bool keep_c = in.states > 1 && cell_states;
  auto y = in.empty(in.output_size());
  auto c = keep_c ? in.empty(in.output_size()) : in.empty({0});
  Tensor h_n = in.empty({in.B, in.H}), c_n = in.states > 1 ? in.empty({in.B, in.H}) : in.empty({0});
  auto saved = in.empty({saved_rows.expect_int(), in.saved, in.H});
  void* const states[] = {y.mutable_data_ptr(), keep_c ? c.mutable_data_ptr() : nullptr};
  void* const last[] = {h_n.mutable_data_ptr(), c_n.mutable_data_ptr()};
  if (in.shape.steps == 1) {
    forward_one_step(in, states, last, saved);
  } else {
    const auto x = in.x_rows();
    Recurrence forward(in, in.shape, x, saved.flatten(1),
                       in.cell.fuses_input(in.shape, x.size(1), in.threads));
    for (int k = 0; k < in.states; ++k) {
      forward.params.states[k] = states[k], forward.params.last[k] = last[k];
    }
    forward.params.from_zero = in.from_zero;
    in.cell.forward(forward.params, in.threads);
  }
  return {y, h_n, c_n, c, saved};
}

// Backward goes through the steps in chunks: the gradients of the gates, and the gates themselves
// if they are computed again, need memory for one chunk only.
class Backward {
 public:
  static constexpr int64_t kRowsAtOnce = 128;

  Backward(const CpuInputs& in, const OutputGrads& grads, const Tensor& y, const Tensor& c,
           const Tensor& saved, const std::array<bool, kInputs>& needed)
      : in_(in),
        states_{y.contiguous(), c.contiguous()},
        saved_(saved.contiguous()),
        kept_(saved.size(0) < in.N ? saved.size(0) / in.B : 0),
        recompute_(saved.size(0) < in.N),
        dgates_row_(dgates_row()),
        dgates_over_saved_(recompute_ && in.grads == in.saved &&
                           dgates_dtype() == in.x.scalar_type()),
        chunks_(chunks()),
        need_x_(needed[0]),
        need_initial_{needed[1], needed[2]},
        need_w_ih_(needed[3]),
        need_w_hh_(needed[4]) {
    dstates_[0] = contiguous(grads[0]), dlast_[0] = contiguous(grads[1]);
    dlast_[1] = contiguous(grads[2]), dstates_[1] = contiguous(grads[3]);
    // What outlives a chunk comes first, so that those of each leave no gap before it.
    if (need_x_) dx_ = in.empty(in.x.sizes());
    dbias_ = in.empty_compute({in.grads * in.H});
    for (int k = 0; k < in.states; ++k) {
      if (chunks_ > 1 || need_initial_[k]) carry_[k] = in.empty({in.B, in.H});
    }
    // Sums over several chunks are kept in the type that they are computed in.
    if (chunks_ > 1 && need_w_ih_) dw_ih_ = in.empty_compute(in.w_ih.sizes());
    if (chunks_ > 1 && need_w_hh_) dw_hh_ = in.empty_compute(in.w_hh.sizes());
  }

  BackwardResult run(bool need_b_ih, bool need_b_hh) {
    for (int64_t i = 0; i < chunks_; ++i) chunk(steps(i), i);
    for (Tensor* dw : {&dw_ih_, &dw_hh_}) {
      if (dw->defined() && dw->scalar_type() != in_.x.scalar_type()) {
        *dw = in_.empty(dw->sizes()).copy_(*dw);
      }
    }
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
  // The fewest that need about the least memory: they save it for rows, and take some for sums in
  // the computing type, which are there while weights are packed again. Each has so many rows that
  // what is done once for each does not count.
  int64_t chunks() const {
    if (in_.shape.batch_sizes || in_.B == 0) return 1;
    const int64_t compute = c10::elementSize(in_.compute);
    const int64_t worthwhile = by_unit() ? 1024 : 512;
    const int64_t least = recompute_
                              ? kLeastChunkRows
                              : std::max(worthwhile, (4 << 20) / (in_.grads * in_.H * compute));
    const int64_t kept = kept_ > 0, others = in_.shape.steps - kept_;
    const int64_t most =
        std::clamp<int64_t>(others * in_.B / least, 1, std::min(others, kMostChunks - kept));
    int64_t best = peak_bytes(1);
    for (int64_t count = 2; count <= most; ++count) best = std::min(best, peak_bytes(count));
    int64_t fewest = 1;
    while (peak_bytes(fewest) > best + best / (recompute_ ? 20 : 10)) ++fewest;
    return fewest + kept;
  }

  // What so many chunks, beside the one that is kept, hold at once, beside what any number does.
  int64_t peak_bytes(int64_t count) const {
    const int64_t rows = (in_.shape.steps - kept_ + count - 1) / count * in_.B;
    const bool one = count == 1 && kept_ == 0;
    const int64_t storage = in_.x.element_size(), grad = c10::elementSize(dgates_dtype());
    const int64_t w_hh = in_.w_hh.numel(), weights = in_.w_ih.numel() + w_hh;
    const int64_t sums = weights * (one ? storage : c10::elementSize(in_.compute));
    const int64_t before = one ? 0 : sums;  // those of the chunks before
    const int64_t saved = recompute_ ? rows * in_.saved * in_.H * storage : 0;
    const int64_t dgates = rows * dgates_row_ * grad;
    const int64_t again = saved + rows * in_.H * storage + w_hh / 2 * grad + before;
    const int64_t steps = dgates + (dgates_over_saved_ ? 0 : saved) + w_hh * grad + before;
    const int64_t products = dgates + rows * std::max(in_.x.size(-1), in_.H) * grad + sums;
    return std::max({recompute_ ? again : 0, steps, products});
  }

  bool by_unit() const {
    return in_.kernels.dgates_in_storage && in_.x.element_size() == 2 && cpu::matrix_unit.multiply;
  }

  at::ScalarType dgates_dtype() const {
    return in_.kernels.dgates_in_storage ? in_.x.scalar_type() : in_.compute;
  }
  // Whole lines of the cache, as the matrix unit reads them, and an odd number: products walk down
  // columns, and at a power of two all rows would meet in the same few sets of the cache.
  int64_t dgates_row() const {
    const int64_t line = 64 / c10::elementSize(dgates_dtype());
    return ((in_.grads * in_.H + line - 1) / line | 1) * line;
  }

  struct Steps {
    bool at_start;        // they are the first that forward took
    int64_t first, rows;  // rows [first, first + rows)
  };
  // Of chunk i, in the order of backward: the one that is kept, or an equal part of the others.
  Steps steps(int64_t i) const {
    if (chunks_ == 1) return {true, 0, in_.N};
    const int64_t T = in_.shape.steps, others = T - kept_, kept = kept_ > 0;
    const int64_t place = chunks_ - 1 - i, parts = chunks_ - kept;
    // In the order of forward.
    const int64_t begin = i < kept ? others : others * place / parts;
    const int64_t end = i < kept ? T : others * (place + 1) / parts;
    const int64_t first = in_.shape.reverse ? T - end : begin;
    return {begin == 0, first * in_.B, (end - begin) * in_.B};
  }

  // After the later ones if i > 0.
  void chunk(const Steps& steps, int64_t i) {
    const int64_t B = in_.B, H = in_.H, count = steps.rows;
    const bool whole = chunks_ == 1;
    const auto rows = [&](const Tensor& t) {
      return Matrix::of(t, in_.N).some_rows(steps.first, count);
    };

    SequenceBackwardParams p{};
    p.shape = in_.shape;
    if (!whole) p.shape.steps = count / B;
    Tensor again = recompute_ && (i > 0 || kept_ == 0) ? gates(steps) : Tensor();
    // Backward reads a row's gates before it writes their gradients.
    const auto dgates =
        dgates_over_saved_ && again.defined()
            ? again
            : empty_cached({count, dgates_row_}, in_.x.options().dtype(dgates_dtype()));
    const auto dbias = i == 0 ? dbias_ : in_.empty_compute({in_.grads * H});
    const bool one_step = in_.shape.steps == 1;  // it does not pay for packing W_hh
    if (!one_step) p.dropout = in_.drawn();
    p.w_hh = one_step ? nullptr : in_.w_hh.const_data_ptr();
    std::vector<Tensor> kept;  // what p points to
    for (int k = 0; k < in_.states; ++k) {
      kept.push_back(initial(k, steps));
      p.initial[k] = kept.back().const_data_ptr();
      p.states[k] = rows(states_[k]).data;
      p.dstates[k] = dstates_[k] ? rows(*dstates_[k]).data : nullptr;
      p.dlast[k] = i == 0 ? data_or_null(dlast_[k]) : carry_[k].const_data_ptr();
      const bool wanted = !steps.at_start || need_initial_[k];
      p.dinitial[k] = wanted ? carry_[k].mutable_data_ptr() : nullptr;
    }
    p.saved = again.defined() ? again.const_data_ptr() : saved(steps);
    p.saved_row = again.defined() ? again.stride(0) : in_.saved * H;
    p.dgates = dgates.mutable_data_ptr(), p.dgates_row = dgates_row_;
    p.dbias = dbias.mutable_data_ptr();
    p.packed = workspace_.defined();
    if (!p.packed) workspace_ = in_.workspace(in_.cell.backward_workspace, p);
    p.workspace = workspace_.mutable_data_ptr();
    in_.cell.backward(p, in_.threads);
    // The products have their own, and packed weights for the next gates take its place.
    if (i + 1 == chunks_ || recompute_) workspace_ = Tensor();
    again = Tensor();
    if (i > 0) dbias_.add_(dbias);

    // The input's gradients come in the cell's own order of gates; see kInputRotation.
    const auto dgates_x = Matrix::of(dgates).some_columns(in_.input_grads * H, in_.G * H);
    const auto dgates_h = Matrix::of(dgates).some_columns(in_.hidden_grads * H, in_.G * H);
    cpu::ProductParams rotated{};
    rotated.b_rotation = rotated.c_rotation = (in_.G - in_.input_rotation) % in_.G * H;
    if (one_step && need_initial_[0]) {
      auto through_w_hh = in_.empty({B, H});
      const auto w_hh = in_.dropout.seed ? in_.kept_w_hh() : in_.w_hh;
      in_.product(in_.kernels.grads, dgates_h, Matrix::of(w_hh), Matrix::of(through_w_hh));
      carry_[0].add_(through_w_hh, in_.dropout.seed ? in_.scale() : 1.0);
    }
    if (need_x_) {
      cpu::ProductParams more = rotated;
      more.c_rotation = 0;
      in_.product(in_.kernels.grads, dgates_x, Matrix::of(in_.w_ih), rows(dx_), more);
    }
    // Of a single chunk the results are made only now, where the packed weights may have been.
    const auto& kernel = whole ? in_.kernels.grads : in_.kernels.sums;
    if (need_w_ih_) {
      if (whole) dw_ih_ = in_.empty(in_.w_ih.sizes());
      cpu::ProductParams more = rotated;
      more.b_rotation = 0, more.accumulate = i > 0;
      in_.product(kernel, dgates_x.t(), rows(in_.x), Matrix::of(dw_ih_), more);
    }
    if (need_w_hh_) {
      if (whole) dw_hh_ = in_.empty(in_.w_hh.sizes());
      cpu::ProductParams more{};
      more.accumulate = i > 0;
      // Rows that found zeros give nothing.
      const bool less = found_zeros(steps);
      const auto h_prev = less ? known(0, steps) : previous(0, steps);
      // Of the whole sum, once; of nothing there is no mask to draw.
      if (i + 1 == chunks_ && (i > 0 || h_prev.numel() > 0)) more.dropout = in_.drawn();
      const auto of_h = dgates_h.some_rows(less && !in_.shape.reverse ? B : 0, h_prev.size(0));
      in_.product(kernel, of_h.t(), Matrix::of(h_prev), Matrix::of(dw_hh_), more);
    }
  }

  // The gates that forward kept.
  const void* saved(const Steps& steps) const {
    const int64_t kept = saved_.size(0);
    const auto begin = SavedRows::make(in_.shape, in_.N, kept).begin;
    return Matrix::of(saved_, kept).some_rows(steps.first - begin, steps.rows).data;
  }

  // The state that the first of the steps found.
  Tensor initial(int k, const Steps& steps) const {
    if (steps.at_start) return in_.initial[k];
    const int64_t row = in_.shape.reverse ? steps.first + steps.rows : steps.first - in_.B;
    return states_[k].view({in_.N, in_.H}).narrow(0, row, in_.B);
  }

  // The first of them found h = 0 in all its rows, and no other begins there.
  bool found_zeros(const Steps& steps) const {
    return steps.at_start && in_.from_zero && !in_.shape.batch_sizes;
  }

  // What their rows found as state k, without those that found the initial one.
  Tensor known(int k, const Steps& steps) const {
    const int64_t inner = steps.rows - (steps.at_start ? in_.B : 0);
    const int64_t first =
        in_.shape.reverse ? steps.first + in_.B : std::max<int64_t>(0, steps.first - in_.B);
    return states_[k].view({in_.N, in_.H}).narrow(0, first, inner);
  }

  // What each of their rows found as state k.
  Tensor previous(int k, const Steps& steps) const {
    if (chunks_ == 1) return in_.previous(k, states_[k]);
    if (!steps.at_start) return known(k, steps);
    auto joined = in_.empty({steps.rows, in_.H});
    return in_.shape.reverse ? at::cat_out(joined, {known(k, steps), in_.initial[k]})
                             : at::cat_out(joined, {in_.initial[k], known(k, steps)});
  }

  // For so many units at once gates are computed again: their weights, with those of so many
  // inputs, are half of the W_hh that backward packs, or a MB.
  int64_t units_at_once(int64_t inputs) const {
    const int64_t element = c10::elementSize(dgates_dtype());
    const int64_t unit = in_.G * (inputs + in_.H) * element;
    const int64_t most = std::max<int64_t>(in_.w_hh.numel() / 2 * element, 1 << 20);
    return std::min((most / unit + 63) / 64 * 64, in_.H);
  }

  // Their gates, from the states alone. No row waits for another: a few hundred at a time make one
  // step of the recurrence.
  Tensor gates(const Steps& steps) const {
    const int64_t H = in_.H, count = steps.rows;
    auto saved = in_.empty({count, dgates_over_saved_ ? dgates_row_ : in_.saved * H});
    if (in_.shape.steps == 1) {
      void* const none[kMaxStates] = {};
      forward_one_step(in_, none, none, saved);
      return saved;
    }
    const auto x = in_.x_rows().narrow(0, steps.first, count);
    std::vector<Tensor> found;
    for (int k = 0; k < in_.states; ++k) found.push_back(previous(k, steps));
    const int64_t most = std::min(count, kRowsAtOnce);
    const auto states = in_.empty({most, H});  // which are known
    const SequenceShape shape = {1, most, H, nullptr, false};
    // Unless in `saved`, x's gates would take more than packed weights do.
    const bool fused =
        !in_.saved_in_compute() && in_.cell.fuses_input(shape, x.size(1), in_.threads);
    const int64_t units = units_at_once(fused ? x.size(1) : 0);
    Recurrence forward(in_, shape, x, saved, fused, units);
    auto& p = forward.params;
    const auto row_of = [](const Tensor& t, int64_t row) {
      return static_cast<char*>(t.data_ptr()) + row * t.stride(0) * t.element_size();
    };
    for (int64_t unit = 0; unit < H; unit += units) {
      p.unit_begin = unit, p.unit_end = std::min(H, unit + units), p.packed = false;
      for (int64_t row = 0; row < count; row += most, p.packed = true) {
        p.shape.batch = std::min(most, count - row);
        if (p.x) p.x = row_of(x, row);
        if (p.x_gates) p.x_gates = row_of(forward.x_gates, row);
        for (int k = 0; k < in_.states; ++k) {
          p.initial[k] = row_of(found[k], row);
          p.states[k] = p.last[k] = states.mutable_data_ptr();
        }
        p.saved = row_of(saved, row);
        in_.cell.forward(p, in_.threads);
      }
    }
    return saved;
  }

  const CpuInputs& in_;
  const Tensor states_[kMaxStates];  // y, c
  const Tensor saved_;
  const int64_t kept_;  // how many steps' gates forward kept, if not all
  const bool recompute_;
  const int64_t dgates_row_;      // elements from one of its rows to the next
  const bool dgates_over_saved_;  // the gates' gradients take the place of gates computed again
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
