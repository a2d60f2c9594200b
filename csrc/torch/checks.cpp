#include "sequence.h"

namespace lstmx {

static void check_size(const Tensor& t, const char* name, std::initializer_list<c10::SymInt> size,
                       const char* meaning) {
  const auto actual = t.sym_sizes();
  bool same = actual.size() == size.size();
  for (size_t i = 0; same && i < size.size(); ++i) same = actual[i] == size.begin()[i];
  TORCH_CHECK(same, name, " must have size ", meaning, " = ",
              c10::SymIntArrayRef(size.begin(), size.size()), ", got ", actual);
}

void check_weight_mask(const Tensor& seed, double p, const char* p_name) {
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, p_name, " must be a probability in [0, 1], got ", p);
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, "seed must have dtype int64, got ",
                   seed.dtype().name());
  TORCH_CHECK(seed.dim() == 0, "seed must be a tensor without dimensions, got size ",
              seed.sym_sizes());
}

void SequenceArgs::check() const {
  const auto G = with_cell(cell, [](auto c) { return decltype(c)::kGates; });
  const auto states = with_cell(cell, [](auto c) { return decltype(c)::kStates; });
  const int64_t dim = batch_sizes ? 2 : 3;
  TORCH_CHECK(x.dim() == dim, "x must have ", dim, " dimensions",
              batch_sizes ? " with batch_sizes" : "", ", got size ", x.sym_sizes());
  TORCH_CHECK(x.sym_size(0) > 0, "Expected sequence length to be larger than 0 in RNN");
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      "x must have dtype float32, float64, bfloat16 or float16, got ", x.dtype().name());
  TORCH_CHECK(w_hh.dim() == 2, "w_hh must have 2 dimensions, got size ", w_hh.sym_sizes());
  TORCH_CHECK(h0.dim() == 2, "h0 must have 2 dimensions, got size ", h0.sym_sizes());
  TORCH_CHECK_VALUE(c0.has_value() == (states == 2), "c0 must be ",
                    states == 2 ? "given" : "absent", " for the cell '", cell, "'");

  const auto B = batch_sizes ? h0.sym_size(0) : x.sym_size(1);
  const auto I = x.sym_size(-1), H = w_hh.sym_size(1);
  TORCH_CHECK(H > 0, "w_hh must have at least one column, got size ", w_hh.sym_sizes());
  check_size(w_hh, "w_hh", {H * G, H}, "[G*H, H]");
  check_size(w_ih, "w_ih", {H * G, I}, "[G*H, I]");
  check_size(h0, "h0", {B, H}, "[B, H]");
  if (c0) check_size(*c0, "c0", {B, H}, "[B, H]");
  if (b_ih) check_size(*b_ih, "b_ih", {H * G}, "[G*H]");
  if (b_hh) check_size(*b_hh, "b_hh", {H * G}, "[G*H]");

  const auto check_like_x = [&](const Tensor& t, const char* name) {
    TORCH_CHECK(t.scalar_type() == dtype, name, " must have the dtype of x, ", x.dtype().name(),
                ", got ", t.dtype().name());
    TORCH_CHECK(t.device() == x.device(), name, " must be on the device of x, ", x.device(),
                ", got ", t.device());
  };
  check_like_x(h0, "h0");
  if (c0) check_like_x(*c0, "c0");
  check_like_x(w_ih, "w_ih");
  check_like_x(w_hh, "w_hh");
  if (b_ih) check_like_x(*b_ih, "b_ih");
  if (b_hh) check_like_x(*b_hh, "b_hh");

  if (batch_sizes) {
    TORCH_CHECK_TYPE(batch_sizes->scalar_type() == at::kLong,
                     "batch_sizes must have dtype int64, got ", batch_sizes->dtype().name());
    TORCH_CHECK(batch_sizes->dim() == 1, "batch_sizes must have 1 dimension, got size ",
                batch_sizes->sym_sizes());
    TORCH_CHECK(batch_sizes->device().is_cpu() || batch_sizes->is_meta(),
                "batch_sizes must be on the CPU, got ", batch_sizes->device());
    TORCH_CHECK(batch_sizes->sym_size(0) > 0,
                "Expected sequence length to be larger than 0 in RNN");
  }
  TORCH_CHECK_VALUE(weight_dropout >= 0 && weight_dropout <= 1,
                    "weight_dropout must be a probability in [0, 1], got ", weight_dropout);
  if (seed) {
    check_weight_mask(*seed, weight_dropout, "weight_dropout");
    TORCH_CHECK(seed->device() == x.device(), "seed must be on the device of x, ", x.device(),
                ", got ", seed->device());
  }
}

c10::SymInt SequenceArgs::sym_rows_kept() const {
  if (batch_sizes) return 0;
  // A tenth of a GRU's; a fifth of an LSTM's, of which torch holds more.
  const int64_t most = c0 ? kMostChunks / 2 : kMostChunks;
  const auto chunks = (sym_rows() / kLeastChunkRows).min(most);
  // As one of so few, the chunk would be most of what is saved.
  if (chunks < 3) return 0;
  return x.sym_size(0) / chunks * x.sym_size(1);
}

int64_t SequenceArgs::check_batch_sizes() const {
  if (!batch_sizes) return x.size(0);
  const auto sizes = batch_sizes->contiguous();
  const auto* size = sizes.const_data_ptr<int64_t>();
  const int64_t T = sizes.numel();
  int64_t rows = 0;
  for (int64_t t = 0; t < T; ++t) {
    TORCH_CHECK_VALUE(size[t] > 0 && size[t] <= (t == 0 ? h0.size(0) : size[t - 1]),
                      "batch_sizes must be positive and never grow, got ", size[t], " at step ", t,
                      " after ", t == 0 ? h0.size(0) : size[t - 1]);
    rows += size[t];
  }
  TORCH_CHECK_VALUE(size[0] == h0.size(0), "batch_sizes must begin with the rows of h0, ",
                    h0.size(0), ", got ", size[0]);
  TORCH_CHECK_VALUE(rows == x.size(0), "batch_sizes must add up to the rows of x, ", x.size(0),
                    ", got ", rows);
  return T;
}

}  // namespace lstmx
