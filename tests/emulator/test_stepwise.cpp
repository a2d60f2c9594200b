// The kernels of the stepwise path under the emulator, in every schedule, against a loop over
// steps, rows and units in double. The loop over steps is as in csrc/torch/sequence_cuda.cpp, which
// has its own tests in Python; products are made plainly here.
#include "cells/gru.h"
#include "cells/lstm.h"
#include "check.h"
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "plain_sequence.h"
#include "walk.h"

using namespace lstmx;
using cuda::padded;

namespace {

// A matrix in padded storage, as long as it must be and no longer.
template <class T>
void product(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t b_column, int64_t m,
             int64_t n, int64_t k, cuda::ComputeOf<T>* c, int64_t c_row, bool add = false) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      cuda::ComputeOf<T> sum = add ? c[i * c_row + j] : 0;
      for (int64_t l = 0; l < k; ++l) {
        sum += widen(a[i * a_row + l]) * widen(b[l * b_row + j * b_column]);
      }
      c[i * c_row + j] = sum;
    }
  }
}

// The same rows with `to` columns in place of `from`: cut, or filled up with zeros.
Values with_columns(const Values& values, int64_t from, int64_t to) {
  const int64_t rows = int64_t(values.size()) / from;
  Values result(rows * to);
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(values.begin() + row * from, std::min(from, to), result.begin() + row * to);
  }
  return result;
}
Values pad(const Values& values, int64_t H) { return with_columns(values, H, padded(H)); }
Values unpad(const Values& values, int64_t H) { return with_columns(values, padded(H), H); }

void succeed(cudaError_t error) { CHECK(error == cudaSuccess); }

template <class Cell, class Storage>
void check_sequence(CellKind kind, DType dtype, const Sequence& q) {
  constexpr int G = Cell::kGates, S = Cell::kStates, D = Cell::kGrads;
  using T = ComputeOf<Storage>;
  const int64_t H = q.H, Hp = padded(H), N = q.N(), B = q.B();
  const auto a = random_arrays<Cell>(q);
  const auto& cell = cuda::cell_kernels(kind, dtype);
  const auto& kernels = cuda::dtype_kernels(dtype);
  const SequenceShape shape = {q.T(), B, H, q.packed ? q.batch_sizes.data() : nullptr, q.reverse};

  const Buffer<Storage> w_dense(a.w_hh), b_ih(a.b_ih), b_hh(a.b_hh);
  const Buffer<Storage> w_hh(G * Hp * Hp);
  cuda::WeightParams weight{G, H, H, 0, {q.p > 0 ? &kSeed : nullptr, q.p}, nullptr, nullptr};
  weight.from = w_dense.data.get(), weight.to = w_hh.data.get();
  succeed(kernels.prepare(weight, nullptr));

  const Buffer<T> x_gates(pad(a.x_gates, H)), h_gates(B * G * Hp);
  const Buffer<Storage> h(pad(a.initial[0], H)), saved(N * Cell::kSaved * H);
  std::vector<Buffer<T>> carried;
  std::vector<Buffer<Storage>> initial, states, dstates;
  for (int k = 0; k < S; ++k) {
    initial.emplace_back(a.initial[k]), dstates.emplace_back(a.dstates[k]);
    carried.emplace_back(initial[k].values()), states.emplace_back(N * H);
  }
  Walk walk(shape, /*backward=*/false);
  while (walk.advance()) {
    cuda::ForwardStepParams p{};
    p.rows = walk.rows, p.hidden = H;
    auto* gates = x_gates.data.get() + walk.offset * G * Hp;
    p.x_gates = gates;
    if (!cell.summed) p.h_gates = gates = h_gates.data.get();
    product(h.data.get(), Hp, w_hh.data.get(), 1, Hp, walk.rows, G * Hp, Hp, gates, G * Hp,
            cell.summed);
    p.next_rows = walk.next_rows;
    p.next_x_gates = x_gates.data.get() + walk.next_offset * G * Hp;
    p.b_ih = b_ih.data.get(), p.b_hh = b_hh.data.get();
    p.h = h.data.get(), p.next_h = h.data.get();
    for (int k = 0; k < S; ++k) {
      p.carried[k] = carried[k].data.get(), p.states[k] = states[k].data.get() + walk.offset * H;
    }
    p.saved = saved.data.get() + walk.offset * Cell::kSaved * H;
    succeed(cell.forward_step(p, nullptr));
  }

  const auto dgates = Buffer<Storage>(N * D * Hp);
  const Buffer<T> sent(G * B * Hp);
  std::vector<Buffer<T>> carry;
  for (int k = 0; k < S; ++k) carry.emplace_back(a.dlast[k]);
  Walk back(shape, /*backward=*/true), ahead = back;
  ahead.advance();
  for (bool more = true; more;) {
    more = back.advance();
    ahead.advance();
    cuda::BackwardStepParams p{};
    p.rows = back.rows, p.product_rows = back.previous_rows, p.hidden = H, p.batch = B;
    p.previous_rows = std::min(back.rows, back.next_rows);
    for (int k = 0; k < S; ++k) {
      p.states[k] = states[k].data.get() + back.offset * H;
      p.previous[k] = states[k].data.get() + back.next_offset * H;
      p.initial[k] = initial[k].data.get();
      p.dstates[k] = dstates[k].data.get() + back.offset * H;
      p.next_previous[k] = states[k].data.get() + ahead.next_offset * H;
      p.next_dstates[k] = dstates[k].data.get() + ahead.offset * H;
      p.carry[k] = carry[k].data.get();
    }
    p.saved = saved.data.get() + back.offset * Cell::kSaved * H;
    p.next_rows = std::min(ahead.rows, ahead.next_rows);
    p.next_saved = saved.data.get() + ahead.offset * Cell::kSaved * H;
    p.product = sent.data.get();
    p.dgates = dgates.data.get() + back.offset * D * Hp;
    succeed(cell.backward_step(p, nullptr));
    if (more) {
      for (int g = 0; g < G; ++g) {
        product(dgates.data.get() + (back.offset * D + Cell::kHiddenGrads + g) * Hp, D * Hp,
                w_hh.data.get() + g * Hp * Hp, Hp, 1, back.rows, Hp, Hp,
                sent.data.get() + g * B * Hp, Hp);
      }
    }
  }
  const Buffer<T> partial(cuda::kSumChunks * D * Hp), sums(D * Hp);
  succeed(kernels.sum_rows({N, D * Hp, dgates.data.get(), partial.data.get(), sums.data.get()},
                           nullptr));

  const double eps = sequence_tolerance<Storage>();
  CHECK(worst(unpad(h.values(), H), a.last[0]) < eps);
  for (int k = 0; k < S; ++k) {
    CHECK(worst(states[k].values(), a.states[k]) < eps);
    CHECK(worst(carry[k].values(), a.dinitial[k]) < eps);
    if (k > 0) CHECK(worst(carried[k].values(), a.last[k]) < eps);
  }
  CHECK(worst(saved.values(), a.saved) < eps);
  CHECK(worst(unpad(dgates.values(), H), a.dgates) < eps);
  CHECK(worst(dgates.values(), pad(a.dgates, H)) < eps);  // the padding is zero
  CHECK(worst(unpad(sums.values(), H), a.dbias) < 10 * eps);
}

template <class Body>
void in_every_order(Body body) {
  using emulator::Order;
  for (const auto order : {Order::kForward, Order::kReverse, Order::kRandom, Order::kSkew}) {
    emulator::options().order = order;
    emulator::options().seed += 1;
    body();
  }
}

template <class Cell>
void check_cell(CellKind kind) {
  for (const auto& q : kSequences) {
    in_every_order([&] { check_sequence<Cell, float>(kind, DType::kFloat32, q); });
    check_sequence<Cell, double>(kind, DType::kFloat64, q);
    check_sequence<Cell, BFloat16>(kind, DType::kBFloat16, q);
    check_sequence<Cell, Float16>(kind, DType::kFloat16, q);
  }
}

}  // namespace

TEST(lstm) { check_cell<Lstm>(CellKind::kLstm); }
TEST(gru) { check_cell<Gru>(CellKind::kGru); }

namespace {

// Weights come back as they went, at rotated places, and a mask drops and scales the same entries.
void check_weights(int64_t K) {
  constexpr int64_t G = 3, H = 5;
  const Values weight = normal_values(G * H * K);
  const Buffer<float> dense(weight), back(G * H * K), mask(G * H * K);
  const Buffer<float> wide(G * padded(H) * padded(K));
  const WeightDropout dropout = {&kSeed, 0.4};
  const auto& kernels = cuda::dtype_kernels(DType::kFloat32);
  in_every_order([&] {
    succeed(kernels.prepare({G, H, K, 1, {}, dense.data.get(), wide.data.get()}, nullptr));
    succeed(kernels.finish({G, H, K, 1, dropout, wide.data.get(), back.data.get()}, nullptr));
    succeed(kernels.mask({G * H * K, dropout, mask.data.get()}, nullptr));
  });
  int dropped = 0;
  for (int64_t e = 0; e < G * H * K; ++e) {
    auto block = philox_counter(e / 4);
    const auto rule = MaskRule::make(kSeed, 0.4);
    philox4x32_10(block, rule.seed);
    const double factor = rule.keeps(block.word[e % 4]) ? rule.scale : 0;
    dropped += factor == 0;
    CHECK_NEAR(mask.data[e], factor, 1e-6);
    CHECK_NEAR(back.data[e], weight[e] * factor, 1e-5);
    const int64_t gate = (e / (H * K) + 1) % G, row = e / K % H;
    CHECK(wide.data[(gate * padded(H) + row) * padded(K) + e % K] == dense.data[e]);
  }
  CHECK(dropped > G * H * K / 4 && dropped < G * H * K / 2);
  double sum = 0, sum_wide = 0;
  for (int64_t e = 0; e < dense.size; ++e) sum += std::fabs(dense.data[e]);
  for (int64_t e = 0; e < wide.size; ++e) sum_wide += std::fabs(wide.data[e]);
  CHECK_NEAR(sum, sum_wide, 1e-9);
}

}  // namespace

TEST(weights) { check_weights(7); }
TEST(weights_with_rows_longer_than_a_blocks_threads) { check_weights(1030); }

TEST(rows_too_long_to_count_in_32_bits_are_refused) {
  const auto& kernels = cuda::dtype_kernels(DType::kFloat32);
  const cuda::WeightParams p = {1, 1, int64_t{1} << 31, 0, {}, nullptr, nullptr};
  CHECK(kernels.prepare(p, nullptr) == cudaErrorInvalidValue);
  CHECK(kernels.finish(p, nullptr) == cudaErrorInvalidValue);
}

TEST(a_failed_launch_is_told_and_the_next_one_works) {
  const Buffer<float> mask(8);
  const cuda::MaskParams p = {8, {&kSeed, 0.5}, mask.data.get()};
  const auto& kernels = cuda::dtype_kernels(DType::kFloat32);
  emulator::injected_error = cudaErrorLaunchOutOfResources;
  CHECK(kernels.mask(p, nullptr) == cudaErrorLaunchOutOfResources);
  CHECK(std::isnan(mask.data[0]));
  succeed(kernels.mask(p, nullptr));
  CHECK(!std::isnan(mask.data[0]));
}
