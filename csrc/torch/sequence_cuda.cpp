// The sequence on a CUDA device, step by step: a product by cuBLAS and a kernel of csrc/cuda for
// each step, everything that concerns all steps at once by one product. Nothing here waits for the
// device or allocates other than through torch, so a CUDA graph can capture all of it.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/kernels.h"
#include "../walk.h"
#include "blas.h"
#include "inputs.h"
#include "ops.h"

namespace lstmx {
namespace {

using cuda::padded;

void check_launch(cudaError_t error, const c10::Device& device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that does not stick is not the next call's
  TORCH_CHECK(error != cudaErrorNoKernelImageForDevice, "lstmx was not built for the device ",
              device,
              "; build it again with TORCH_CUDA_ARCH_LIST naming that device's architecture");
  TORCH_CHECK(false, "lstmx could not launch a kernel on ", device, ": ",
              cudaGetErrorString(error));
}

// Every operand and result of a product has rows of whole 16-byte words: on others cuBLAS takes
// kernels that are several times slower.
void check_aligned(const Tensor& t) {
  const auto rows = t.stride(1) == 1 ? t.stride(0) : t.stride(1);
  TORCH_INTERNAL_ASSERT(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 &&
                            (t.numel() == 0 || rows * t.element_size() % 16 == 0),
                        "a product of sizes ", t.sizes(), " and strides ", t.strides(),
                        " is not aligned");
}

struct CudaInputs : Inputs {
  explicit CudaInputs(const SequenceArgs& args)
      : Inputs(args),
        guard(x.device()),
        stream(c10::cuda::getCurrentCUDAStream(x.device().index()).stream()),
        I(x.size(-1)),
        Hp(padded(H)),
        Ip(padded(I)),
        // As torch's own recurrent nets, whatever the flag of other products says.
        blas(dtype,
             dtype == DType::kFloat32 && at::globalContext().allowTF32CuDNN(at::Float32Op::RNN)),
        cell(cuda::cell_kernels(kind, dtype)),
        kernels(cuda::dtype_kernels(dtype)) {}

  void check(cudaError_t error) const { check_launch(error, x.device()); }

  // out = a b; out is storage or compute.
  Product product_of(const Tensor& a, const Tensor& b, const Tensor& out) const {
    for (const auto* t : {&a, &b, &out}) check_aligned(*t);
    Product p{a.size(0), b.size(1), a.size(1)};
    p.a = a.const_data_ptr(), p.a_row = a.stride(0), p.a_column = a.stride(1);
    p.b = b.const_data_ptr(), p.b_row = b.stride(0), p.b_column = b.stride(1);
    p.c = out.mutable_data_ptr(), p.c_row = out.stride(0);
    p.narrow = out.scalar_type() != compute;
    return p;
  }
  void product(const Tensor& a, const Tensor& b, Tensor out, bool add = false) const {
    if (a.size(1) == 0) {
      if (!add) out.zero_();
    } else {
      auto p = product_of(a, b, out);
      p.add = add;
      blas.multiply(p);
    }
  }

  cuda::WeightParams weight_params(int64_t columns, int64_t rotation,
                                   const WeightDropout& mask) const {
    return {G, H, columns, rotation, mask, nullptr, nullptr};
  }
  // [G*H, K] -> [G*Hp, Kp], masked.
  Tensor prepare(const Tensor& weight, int64_t rotation, const WeightDropout& mask = {}) const {
    const int64_t K = weight.size(1), Kp = padded(K);
    const auto from = weight.contiguous();
    if (H == Hp && K == Kp && rotation == 0 && !mask.seed && is_aligned(from)) return from;
    auto to = empty({G * Hp, Kp});
    auto p = weight_params(K, rotation, mask);
    p.from = from.const_data_ptr(), p.to = to.mutable_data_ptr();
    check(kernels.prepare(p, stream));
    return to;
  }
  // [rows, K] -> [rows, Kp], new.
  Tensor padded_copy(const Tensor& from) const {
    const int64_t rows = from.size(0), K = from.size(1);
    auto to = empty({padded(rows), padded(K)});
    check(
        kernels.prepare({1, rows, K, 0, {}, from.const_data_ptr(), to.mutable_data_ptr()}, stream));
    return to.narrow(0, 0, rows);
  }
  // The same of an operand, whose rows may begin anywhere; itself, where that will do.
  Tensor pad(const Tensor& t) const {
    const auto from = t.contiguous();
    return t.size(1) == padded(t.size(1)) && is_aligned(from) ? from : padded_copy(from);
  }
  // And back.
  Tensor unpad(const Tensor& t, int64_t to) const {
    return t.size(1) == to ? t : t.narrow(1, 0, to).contiguous();
  }
  // [G*Hp, Kp] compute -> [G*H, K] storage, masked.
  Tensor finish(const Tensor& grad, int64_t columns, int64_t rotation,
                const WeightDropout& mask = {}) const {
    auto to = empty({G * H, columns});
    auto p = weight_params(columns, rotation, mask);
    p.from = grad.const_data_ptr(), p.to = to.mutable_data_ptr();
    check(kernels.finish(p, stream));
    return to;
  }
  static bool is_aligned(const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  }
  // [N, G*Hp] compute: x W_ih^T.
  Tensor x_gates(const Tensor& rows) const {
    auto gates = empty_compute({N, G * Hp});
    product(rows, prepare(w_ih, 0).t(), gates);
    return gates;
  }
  // [rows, G*Hp] compute, for h W_hh^T; undefined where that is added to x_gates.
  Tensor h_gates(int64_t rows) const {
    return cell.summed ? Tensor() : empty_compute({rows, G * Hp});
  }

  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
  int64_t I, Hp, Ip;
  Blas blas;
  const cuda::CellKernels& cell;
  const cuda::DTypeKernels& kernels;
};

// The address of `row` in a matrix, or null.
const void* row_of(const OptionalTensor& t, int64_t row, int64_t row_elements) {
  if (!t || !t->defined()) return nullptr;
  return static_cast<const char*>(t->const_data_ptr()) + row * row_elements * t->element_size();
}
void* row_of(const Tensor& t, int64_t row, int64_t row_elements) {
  if (!t.defined()) return nullptr;
  return static_cast<char*>(t.mutable_data_ptr()) + row * row_elements * t.element_size();
}

ForwardResult sequence_forward_cuda(const SequenceArgs& args, c10::SymInt saved_rows,
                                    bool cell_states) {
  const CudaInputs in(args);
  const bool keep_c = in.states > 1 && cell_states;
  const Tensor states[] = {in.empty(in.output_size()),
                           keep_c ? in.empty(in.output_size()) : Tensor()};
  const auto saved = in.empty({saved_rows.expect_int(), in.saved, in.H});
  const auto kept = SavedRows::make(in.shape, in.N, saved.size(0));

  const auto x_gates = in.x_gates(in.pad(in.x_rows()));
  const auto w_hh_t = in.prepare(in.w_hh, 0, in.dropout).t();
  const auto h_gates = in.h_gates(in.B);
  // States in the making; the product reads h, and the kernel after it writes the next one there.
  const auto h = in.padded_copy(in.initial[0]);
  Tensor carried[kMaxStates];
  for (int k = 1; k < in.states; ++k) {
    carried[k] = in.initial[k].to(in.compute, /*non_blocking=*/false, /*copy=*/true);
  }

  auto step = in.product_of(h, w_hh_t, in.cell.summed ? x_gates : h_gates);
  step.add = in.cell.summed;
  Walk walk(in.shape, /*backward=*/false);
  while (walk.advance()) {
    cuda::ForwardStepParams p{};
    p.rows = walk.rows, p.hidden = in.H;
    p.x_gates = row_of(x_gates, walk.offset, in.G * in.Hp);
    p.h_gates = row_of(h_gates, 0, 0);
    p.next_rows = walk.next_rows;
    p.next_x_gates = row_of(x_gates, walk.next_offset, in.G * in.Hp);
    p.b_ih = data_or_null(in.b_ih), p.b_hh = data_or_null(in.b_hh);
    p.h = h.const_data_ptr(), p.next_h = h.mutable_data_ptr();
    for (int k = 0; k < in.states; ++k) {
      p.carried[k] = row_of(carried[k], 0, in.H);
      p.states[k] = row_of(states[k], walk.offset, in.H);
    }
    if (walk.offset >= kept.begin && walk.offset < kept.end) {
      p.saved = row_of(saved, walk.offset - kept.begin, in.saved * in.H);
    }
    step.m = walk.rows;
    if (step.add) step.c = row_of(x_gates, walk.offset, in.G * in.Hp);
    in.blas.multiply(step);
    in.check(in.cell.forward_step(p, in.stream));
  }
  const auto none = [&](const Tensor& t) { return t.defined() ? t : in.empty({0}); };
  return {states[0], h.narrow(1, 0, in.H).clone(at::MemoryFormat::Contiguous),
          in.states > 1 ? carried[1].to(in.x.scalar_type()) : in.empty({0}), none(states[1]),
          saved};
}

// Of gates computed again: enough to fill the device, few enough for what they are made of not to
// take more memory than it saves.
constexpr int64_t kRowsAtOnce = 2048;

// All gates, of which some were kept; the others from the states alone. No row waits for another:
// many at a time make one step.
Tensor recompute_gates(const CudaInputs& in, const Tensor& kept, const Tensor& x_operand,
                       const Tensor& h_prev, const Tensor& c) {
  auto saved = in.empty({in.N, in.saved, in.H});
  const auto known = SavedRows::make(in.shape, in.N, kept.size(0));
  saved.narrow(0, known.begin, kept.size(0)).copy_(kept);
  const int64_t first = in.shape.reverse ? known.end : 0, end = first + in.N - kept.size(0);
  const auto w_ih_t = in.prepare(in.w_ih, 0).t();
  const auto w_hh_t = in.prepare(in.w_hh, 0, in.dropout).t();
  const int64_t most = std::min(end - first, kRowsAtOnce);
  const auto x_gates = in.empty_compute({most, in.G * in.Hp}), h_gates = in.h_gates(most);
  const auto c_prev = in.states > 1 ? in.previous(1, c) : Tensor();
  for (int64_t row = first; row < end; row += most) {
    const int64_t rows = std::min(most, end - row);
    in.product(x_operand.narrow(0, row, rows), w_ih_t, x_gates.narrow(0, 0, rows));
    const auto& to = in.cell.summed ? x_gates : h_gates;
    in.product(h_prev.narrow(0, row, rows), w_hh_t, to.narrow(0, 0, rows), in.cell.summed);
    cuda::ForwardStepParams p{};
    p.rows = rows, p.hidden = in.H;
    p.x_gates = x_gates.const_data_ptr(), p.h_gates = row_of(h_gates, 0, 0);
    p.b_ih = data_or_null(in.b_ih), p.b_hh = data_or_null(in.b_hh);
    p.h = row_of(OptionalTensor(h_prev), row, in.Hp);
    Tensor carried;
    if (in.states > 1) {
      carried = c_prev.narrow(0, row, rows).to(in.compute);
      p.carried[1] = carried.mutable_data_ptr();
    }
    p.saved = row_of(saved, row, in.saved * in.H);
    in.check(in.cell.forward_step(p, in.stream));
  }
  return saved;
}

BackwardResult sequence_backward_cuda(const SequenceArgs& args, const OutputGrads& grads,
                                      const Tensor& y_, const Tensor& c_, const Tensor& saved_,
                                      std::array<bool, kInputs> needed) {
  const CudaInputs in(args);
  const auto [need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh] = needed;
  const auto y = y_.contiguous(), c = c_.contiguous();
  const bool recompute = saved_.size(0) < in.N;
  Tensor h_prev, x_operand;
  if (recompute || need_w_hh) h_prev = in.pad(in.previous(0, y));
  if (recompute || need_w_ih) x_operand = in.pad(in.x_rows());
  const auto saved =
      recompute ? recompute_gates(in, saved_, x_operand, h_prev, c) : saved_.contiguous();

  const auto w_hh = in.prepare(in.w_hh, 0, in.dropout);
  const auto dgates = in.empty({in.N, in.grads * in.Hp});
  const auto part = [&](int64_t first, int64_t offset, int64_t rows) {
    return dgates.narrow(0, offset, rows).narrow(1, first * in.Hp, in.G * in.Hp);
  };
  // A product for each gate, summed by the kernel after it: one of all gates has too few results to
  // fill the device, and too many terms in each.
  const auto sent_back = in.empty_compute({in.G, in.B, in.Hp});
  auto step = in.product_of(part(in.hidden_grads, 0, in.N).narrow(1, 0, in.Hp),
                            w_hh.narrow(0, 0, in.Hp), sent_back[0]);
  step.count = in.G, step.a_next = in.Hp, step.b_next = in.Hp * in.Hp;
  step.c_next = in.B * in.Hp;
  const Tensor states[] = {y, c};
  const OptionalTensor dstates[] = {contiguous(grads[0]), contiguous(grads[3])};
  const OptionalTensor dlast[] = {grads[1], grads[2]};
  Tensor carry[kMaxStates];
  for (int k = 0; k < in.states; ++k) {
    carry[k] = at::zeros({in.B, in.H}, in.x.options().dtype(in.compute));
    if (dlast[k]) carry[k].copy_(*dlast[k]);
  }

  Walk walk(in.shape, /*backward=*/true), ahead = walk;
  ahead.advance();
  for (bool more = true; more;) {
    more = walk.advance();
    ahead.advance();
    cuda::BackwardStepParams p{};
    p.rows = walk.rows, p.product_rows = walk.previous_rows, p.hidden = in.H, p.batch = in.B;
    // Backward comes to the step before in time only next.
    p.previous_rows = std::min(walk.rows, walk.next_rows);
    for (int k = 0; k < in.states; ++k) {
      p.states[k] = row_of(states[k], walk.offset, in.H);
      p.previous[k] = row_of(states[k], walk.next_offset, in.H);
      p.initial[k] = in.initial[k].const_data_ptr();
      p.dstates[k] = row_of(dstates[k], walk.offset, in.H);
      p.next_previous[k] = row_of(states[k], ahead.next_offset, in.H);
      p.next_dstates[k] = row_of(dstates[k], ahead.offset, in.H);
      p.carry[k] = carry[k].mutable_data_ptr();
    }
    p.saved = row_of(OptionalTensor(saved), walk.offset, in.saved * in.H);
    p.next_rows = std::min(ahead.rows, ahead.next_rows);
    p.next_saved = row_of(OptionalTensor(saved), ahead.offset, in.saved * in.H);
    p.product = sent_back.const_data_ptr();
    p.dgates = row_of(dgates, walk.offset, in.grads * in.Hp);
    in.check(in.cell.backward_step(p, in.stream));
    if (more) {
      step.m = walk.rows;
      step.a = row_of(dgates, walk.offset * in.grads + in.hidden_grads, in.Hp);
      in.blas.multiply(step);
    }
  }

  const auto dgates_x = part(in.input_grads, 0, in.N), dgates_h = part(in.hidden_grads, 0, in.N);
  Tensor dx, dw_ih, dw_hh, db_ih, db_hh;
  if (need_x) {
    const auto dx_rows = in.empty({in.N, in.Ip});
    in.product(dgates_x, in.prepare(in.w_ih, in.input_rotation), dx_rows);
    dx = in.unpad(dx_rows, in.I).view(in.x.sizes());
  }
  if (need_w_ih) {
    const auto grad = in.empty_compute({in.G * in.Hp, in.Ip});
    in.product(dgates_x.t(), x_operand, grad);
    dw_ih = in.finish(grad, in.I, in.input_rotation);
  }
  if (need_w_hh) {
    const auto grad = in.empty_compute({in.G * in.Hp, in.Hp});
    in.product(dgates_h.t(), h_prev, grad);
    dw_hh = in.finish(grad, in.H, 0, in.dropout);
  }
  if (need_b_ih || need_b_hh) {
    const auto partial = in.empty_compute({cuda::kSumChunks, in.grads * in.Hp});
    const auto sums = in.empty_compute({in.grads, in.Hp});
    in.check(in.kernels.sum_rows({in.N, in.grads * in.Hp, dgates.const_data_ptr(),
                                  partial.mutable_data_ptr(), sums.mutable_data_ptr()},
                                 in.stream));
    std::tie(db_ih, db_hh) = in.bias_grads(sums.narrow(1, 0, in.H).contiguous());
  }
  const auto storage = in.x.scalar_type();
  return {dx,
          need_h0 ? carry[0].to(storage) : Tensor(),
          need_c0 ? carry[1].to(storage) : Tensor(),
          dw_ih,
          dw_hh,
          need_b_ih ? db_ih : Tensor(),
          need_b_hh ? db_hh : Tensor()};
}

Tensor weight_mask_cuda(const Tensor& seed, at::IntArrayRef size, double p, at::ScalarType dtype) {
  check_weight_mask(seed, p, "p");
  const c10::cuda::CUDAGuard guard(seed.device());
  const bool wide = dtype == at::kDouble;
  const auto mask = at::empty(size, seed.options().dtype(wide ? at::kDouble : at::kFloat));
  const cuda::MaskParams params = {
      mask.numel(), {seed.const_data_ptr<int64_t>(), p}, mask.mutable_data_ptr()};
  const auto stream = c10::cuda::getCurrentCUDAStream(seed.device().index()).stream();
  const auto& kernels = cuda::dtype_kernels(wide ? DType::kFloat64 : DType::kFloat32);
  check_launch(kernels.mask(params, stream), seed.device());
  return mask.to(dtype);
}

}  // namespace

#if defined(LSTMX_EMULATED)
LSTMX_IMPLEMENT(CPU, m) {
#else
LSTMX_IMPLEMENT(CUDA, m) {
#endif
  m.impl("_sequence_forward", sequence_forward<sequence_forward_cuda>);
  m.impl("_sequence_backward", sequence_backward<sequence_backward_cuda>);
  m.impl("weight_mask", weight_mask_cuda);
}

}  // namespace lstmx
