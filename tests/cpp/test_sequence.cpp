// The CPU kernels against a loop over steps, rows and units in double: every cell, dtype and kind
// of sequence, with one thread and with three.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "check.h"
#include "cpu/kernels.h"
#include "cpu/matrix_unit.h"
#include "plain_sequence.h"

using namespace lstmx;

namespace {

struct Workspace {
  explicit Workspace(int64_t bytes) : data(new (std::align_val_t(64)) char[bytes]) {}
  ~Workspace() { operator delete[](data, std::align_val_t(64)); }
  char* data;
};

// Where other processes hold the cores, a thread's teams may be of one member for a while; the
// first of a new thread never is.
template <class Call>
void with_whole_team(const Call& call) {
  std::thread(call).join();
}

// Weight dropout as the kernels want it; none if p is 0.
struct Drawn {
  Drawn(double p, int64_t elements) : kept(cpu::kernels().mask_bytes(elements)) {
    if (p == 0) return;
    dropout = {&kSeed, p, kept.data()};
    with_whole_team([&] { cpu::kernels().draw_mask(dropout, elements, kept.data(), 3); });
  }
  std::vector<uint8_t> kept;
  WeightDropout dropout{nullptr, 0};
};

// Stands in for the processor's unit.
void multiply_plainly(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda,
                      const BFloat16* b, const BFloat16* /*next*/, bool accumulate, float* c) {
  CHECK(m > 0 && n > 0 && n <= 64 && n % 16 == 0 && k > 0 && k % 2 == 0 && lda >= k);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = accumulate ? c[i * n + j] : 0;
      for (int64_t l = 0; l < k; ++l) {
        sum += widen(a[i * lda + l]) * widen(b[(l / 2 * n + j) * 2 + l % 2]);
      }
      c[i * n + j] = sum;
    }
  }
}

struct WithMatrixUnit {
  explicit WithMatrixUnit(cpu::MatrixUnit unit) { cpu::matrix_unit = unit; }
  ~WithMatrixUnit() { cpu::matrix_unit = {}; }
};
struct PlainMatrixUnit : WithMatrixUnit {
  PlainMatrixUnit() : WithMatrixUnit({multiply_plainly, [] { ++releases; }}) {}
  static inline std::atomic<int> releases{0};
};

// Where the gates' gradients are multiplied as 16-bit numbers, they are rounded to them first.
template <class Cell, class Storage, class DGates = ComputeOf<Storage>>
void check_sequence(CellKind kind, DType dtype, const Sequence& q, int threads) {
  constexpr int G = Cell::kGates, S = Cell::kStates;
  using T = ComputeOf<Storage>;
  const int64_t H = q.H, N = q.N(), B = q.B();
  const auto a = random_arrays<Cell>(q);

  const auto& table = cpu::kernels(dtype, sizeof(DGates) == 2);
  const auto& kernels = table.cells[int(kind)];
  CHECK((table.dgates_in_storage == std::is_same_v<DGates, Storage>));
  const SequenceShape shape = {q.T(), B, H, q.packed ? q.batch_sizes.data() : nullptr, q.reverse};
  const Drawn drawn(q.p, G * H * H);
  const int64_t room = q.p > 0 ? 5 : 0;  // between rows
  const int64_t saved_row = Cell::kSaved * H + room, dgates_row = Cell::kGrads * H + room;
  Buffer<T> x_gates(a.x_gates);
  Buffer<Storage> w_hh(a.w_hh), b_ih(a.b_ih), b_hh(a.b_hh), saved(N * saved_row);
  std::vector<Buffer<Storage>> initial, states, last, dstates, dlast, dinitial;
  SequenceForwardParams f{};
  f.shape = shape, f.dropout = drawn.dropout;
  f.x_gates = x_gates.data.get(), f.x_gates_stride = G * H;
  f.w_hh = w_hh.data.get(), f.b_ih = b_ih.data.get(), f.b_hh = b_hh.data.get();
  f.saved = saved.data.get(), f.saved_row = saved_row, f.saved_begin = 0, f.saved_end = N;
  f.from_zero = q.from_zero;
  for (int k = 0; k < S; ++k) {
    initial.emplace_back(a.initial[k]), states.emplace_back(N * H), last.emplace_back(B * H);
    dstates.emplace_back(a.dstates[k]), dlast.emplace_back(a.dlast[k]);
    dinitial.emplace_back(B * H);
    f.initial[k] = initial[k].data.get();
    f.states[k] = states[k].data.get(), f.last[k] = last[k].data.get();
  }
  const Workspace forward_workspace(kernels.forward_workspace(f, threads));
  f.workspace = forward_workspace.data;
  with_whole_team([&] { kernels.forward(f, threads); });

  Buffer<DGates> dgates(N * dgates_row);
  Buffer<T> dbias(Cell::kGrads * H);
  SequenceBackwardParams b{};
  b.shape = shape, b.dropout = drawn.dropout;
  b.w_hh = w_hh.data.get(), b.saved = saved.data.get(), b.saved_row = saved_row;
  for (int k = 0; k < S; ++k) {
    b.initial[k] = initial[k].data.get(), b.states[k] = states[k].data.get();
    b.dstates[k] = dstates[k].data.get(), b.dlast[k] = dlast[k].data.get();
    b.dinitial[k] = dinitial[k].data.get();
  }
  b.dgates = dgates.data.get(), b.dgates_row = dgates_row, b.dbias = dbias.data.get();
  const Workspace backward_workspace(kernels.backward_workspace(b, threads));
  b.workspace = backward_workspace.data;
  with_whole_team([&] { kernels.backward(b, threads); });

  const double eps = sequence_tolerance<Storage>();
  for (int k = 0; k < S; ++k) {
    CHECK(worst(states[k].values(), a.states[k]) < eps);
    CHECK(worst(last[k].values(), a.last[k]) < eps);
    CHECK(worst(dinitial[k].values(), a.dinitial[k]) < eps);
  }
  const auto without_room = [&](const Values& spaced) {
    Values close;
    for (auto row = spaced.begin(); row != spaced.end(); row += spaced.size() / N) {
      close.insert(close.end(), row, row + spaced.size() / N - room);
    }
    return close;
  };
  CHECK(worst(without_room(saved.values()), a.saved) < eps);
  CHECK(worst(without_room(dgates.values()), a.dgates) < eps);
  CHECK(worst(dbias.values(), a.dbias) < eps);

  if (q.packed) return;
  // Once more, keeping the gates of one step in the middle, with room for all after it.
  f.saved_begin = q.T() / 2 * B, f.saved_end = f.saved_begin + B;
  const int64_t first = f.saved_begin * Cell::kSaved * H, count = B * Cell::kSaved * H;
  const Values all = without_room(saved.values());
  Buffer<Storage> some(N * Cell::kSaved * H - first);
  f.saved = some.data.get(), f.saved_row = Cell::kSaved * H;
  with_whole_team([&] { kernels.forward(f, threads); });
  const Values kept = some.values();
  const auto end = kept.begin() + count;
  CHECK(std::equal(kept.begin(), end, all.begin() + first));
  CHECK(std::all_of(end, kept.end(), [](double value) { return std::isnan(value); }));

  if (q.reverse || H <= 64) return;
  // The first step alone, in two parts of its units.
  Buffer<Storage> parts(B * Cell::kSaved * H);
  f.shape.steps = 1, f.saved_begin = 0, f.saved_end = B, f.saved = parts.data.get();
  for (const int64_t begin : {0, 64}) {
    f.unit_begin = begin, f.unit_end = begin == 0 ? 64 : H;
    with_whole_team([&] { kernels.forward(f, threads); });
  }
  const Values both = parts.values();
  CHECK(std::equal(both.begin(), both.end(), all.begin()));
}

template <class Cell>
void check_cell(CellKind kind) {
  for (const auto& q : kSequences) {
    for (const int threads : {1, 3}) {
      check_sequence<Cell, float>(kind, DType::kFloat32, q, threads);
      check_sequence<Cell, double>(kind, DType::kFloat64, q, threads);
      check_sequence<Cell, BFloat16>(kind, DType::kBFloat16, q, threads);
      check_sequence<Cell, Float16>(kind, DType::kFloat16, q, threads);
    }
  }
}

}  // namespace

TEST(lstm_sequence) { check_cell<Lstm>(CellKind::kLstm); }
TEST(gru_sequence) { check_cell<Gru>(CellKind::kGru); }

namespace {

bool has_pairs() {
  if (cpu::kernels(DType::kBFloat16, true).dgates_in_storage) return true;
  [[maybe_unused]] static const int once = std::puts("skipped: AVX512_BF16, not at hand here");
  return false;
}

void check_pairs() {
  for (const auto& q : kSequences) {
    for (const int threads : {1, 3}) {
      check_sequence<Lstm, BFloat16, BFloat16>(CellKind::kLstm, DType::kBFloat16, q, threads);
      check_sequence<Gru, BFloat16, BFloat16>(CellKind::kGru, DType::kBFloat16, q, threads);
    }
  }
}

}  // namespace

TEST(matrix_unit) {
  if (!has_pairs()) return;
  const PlainMatrixUnit unit;
  check_pairs();
  CHECK(PlainMatrixUnit::releases > 0);
}

// The processor's own.
bool has_unit() {
  if (cpu::kernels().matrix_unit.multiply && cpu::has_matrix_unit()) return true;
  [[maybe_unused]] static const int once = std::puts("skipped: AMX, which is not at hand here");
  return false;
}

TEST(amx) {
  if (!has_unit()) return;
  const WithMatrixUnit unit(cpu::kernels().matrix_unit);
  check_pairs();
}

// It gives the plain sums, whatever the sizes: few or many rows, all widths, a rest of the depth.
TEST(amx_products) {
  if (!has_unit()) return;
  const auto& unit = cpu::kernels().matrix_unit;
  for (const int64_t m : {1, 2, 3, 15, 16, 17, 31, 32, 33, 49, 77, 80, 128}) {
    for (const int64_t n : {16, 32, 48, 64}) {
      for (const int64_t k : {2, 30, 32, 34, 190, 192, 194, 450}) {
        // Exact in any order. What lies behind a's rows must not matter.
        const int64_t lda = k + 6, rows = (k + cpu::kUnitTerms - 1) / cpu::kUnitTerms * 32;
        std::vector<BFloat16> a(m * lda), b(rows * n);
        for (int64_t i = 0; i < m * lda; ++i) {
          narrow(i % lda < k ? float(i % 11) - 5 : NAN, a[i]);
        }
        for (int64_t i = 0; i < rows * n; ++i) narrow(i < k * n ? float(i % 7) - 3 : 0, b[i]);
        std::vector<float> c(m * n, 100), expected(m * n, 100);
        for (const bool accumulate : {false, true, true}) {
          multiply_plainly(m, n, k, a.data(), lda, b.data(), b.data(), accumulate, expected.data());
          unit.multiply(m, n, k, a.data(), lda, b.data(), accumulate ? b.data() : nullptr,
                        accumulate, c.data());
          CHECK(c == expected);
        }
      }
    }
  }
  unit.release();
}

TEST(pair_instruction) {
  if (has_pairs()) check_pairs();
}

namespace {

// The error in units in the last place of the exact result.
template <class T>
double ulps(T got, long double exact) {
  using Limits = std::numeric_limits<T>;
  const int last = std::max(std::ilogb(exact) + 1, Limits::min_exponent) - Limits::digits;
  return double(std::fabs(std::ldexp(got - exact, -last)));
}

// An LSTM's step saves what it makes of given pre-activations: i is their sigmoid, g their tanh.
template <class T>
void check_nonlinearities(const cpu::KernelTable& table, DType dtype, double most_of_sigmoid,
                          double most_of_tanh) {
  using Limits = std::numeric_limits<T>;
  constexpr T kInfinity = Limits::infinity(), kTiny = Limits::denorm_min();
  // Those that have an exact result; then numbers of every size and sign.
  std::vector<T> x = {NAN,  kInfinity, -kInfinity, Limits::max(), -Limits::max(),
                      -0.0, kTiny,     -kTiny};
  std::mt19937 random(1);
  std::uniform_real_distribution<double> exponent(Limits::min_exponent - Limits::digits, 10);
  for (const double value : normal_values(20000, 3)) {
    x.push_back(T(value));
    x.push_back(T(std::copysign(std::exp2(exponent(random)), value)));
  }
  const int64_t H = x.size();
  std::vector<T> x_gates, h_gates(Lstm::kGates * H, T(-0.0)), zeros(H), saved(Lstm::kSaved * H);
  for (int g = 0; g < Lstm::kGates; ++g) x_gates.insert(x_gates.end(), x.begin(), x.end());
  StepParams p{};
  p.shape = {1, 1, H, nullptr, false};
  p.x_gates = x_gates.data(), p.h_gates = h_gates.data();
  p.initial[0] = p.initial[1] = zeros.data(), p.saved = saved.data();
  table.by_dtype[int(dtype)].cells[int(CellKind::kLstm)].step(p, 1);

  const T *sigmoid = saved.data(), *tanh = saved.data() + 2 * H;
  CHECK(std::isnan(sigmoid[0]) && std::isnan(tanh[0]));
  CHECK(sigmoid[1] == 1 && sigmoid[2] == 0 && sigmoid[3] == 1 && sigmoid[4] == 0);
#if defined(LSTMX_CALLS)
  constexpr T kLimit = 1 - Limits::epsilon() / 2;  // nothing is fused, which a quotient relies on
#else
  constexpr T kLimit = 1;
#endif
  CHECK(tanh[1] >= kLimit && tanh[2] <= -kLimit && tanh[3] >= kLimit && tanh[4] <= -kLimit);
  CHECK(sigmoid[5] == 0.5 && tanh[5] == 0 && std::signbit(tanh[5]));
  CHECK(tanh[6] == kTiny && tanh[7] == -kTiny);
  double sigmoid_error = 0, tanh_error = 0;
  for (size_t i = 1; i < x.size(); ++i) {
    CHECK(sigmoid[i] >= 0 && sigmoid[i] <= 1 && std::fabs(tanh[i]) <= 1);
    tanh_error = std::max(tanh_error, ulps(tanh[i], std::tanh((long double)x[i])));
    const long double exact = 1 / (1 + std::exp(-(long double)x[i]));
    // Subnormal results may be zero.
    if (exact < Limits::min()) {
      CHECK(sigmoid[i] < Limits::min());
    } else {
      sigmoid_error = std::max(sigmoid_error, ulps(sigmoid[i], exact));
    }
  }
  CHECK(sigmoid_error <= most_of_sigmoid);
  CHECK(tanh_error <= most_of_tanh);
}

}  // namespace

// Of every instruction set at hand. A large negative x times log2(e) is rounded in float; where
// multiplications are not fused, twice.
TEST(nonlinearities) {
  for (const cpu::KernelTable* table : {
           &cpu::kBaselineKernels,
#if defined(__x86_64__)
           &cpu::kAvx2Kernels,
           &cpu::kAvx512Kernels,
#endif
       }) {
    check_nonlinearities<float>(*table, DType::kFloat32, 64, 4);
    check_nonlinearities<double>(*table, DType::kFloat64, 2.5, 3.5);
    if (table == &cpu::kernels()) break;
  }
}

// Large enough for a team, both ways of sharing the work.
TEST(teams) {
  check_sequence<Lstm, float>(CellKind::kLstm, DType::kFloat32,
                              {96, {16, 16, 16}, false, false, 0.5}, 3);
  check_sequence<Gru, float>(CellKind::kGru, DType::kFloat32, {320, {6, 6, 5, 1}, true, true, 0.5},
                             3);
}

namespace {

// Both operands in both layouts; with a mask, or rotated as far as that is offered. c is added to a
// second time.
template <class Storage, class C>
void check_product(const cpu::ProductKernel& kernel, int64_t m, int64_t n, int64_t k, int layout,
                   bool masked, int threads) {
  const Buffer<Storage> a(normal_values(m * k)), b(normal_values(k * n));
  Buffer<C> c(m * n);
  cpu::ProductParams p{};
  p.m = m, p.n = n, p.k = k;
  p.a = a.data.get(), p.b = b.data.get(), p.c = c.data.get(), p.c_row = n;
  p.a_row = layout & 1 ? 1 : k, p.a_column = layout & 1 ? m : 1;
  p.b_row = layout & 2 ? 1 : n, p.b_column = layout & 2 ? k : 1;
  const Drawn drawn(masked ? 0.5 : 0, m * n);
  p.dropout = drawn.dropout;
  if (!masked && layout == 0 && k > 0) p.b_rotation = k / 3;
  if (!masked && layout == 1) p.c_rotation = m / 3;

  std::vector<float> mask(m * n, 1.0f);
  if (masked) cpu::kernels().mask_float(p.dropout, 0, m * n, mask.data());
  const Values a_values = a.values(), b_values = b.values();
  Values expected(m * n), magnitude(m * n);  // the sums of the terms and of their absolute values
  for (int64_t i = 0; i < m; ++i) {
    const int64_t row = (i + p.c_rotation) % m;
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, absolute = 0;
      for (int64_t l = 0; l < k; ++l) {
        const double term = a_values[i * p.a_row + l * p.a_column] *
                            b_values[(l + p.b_rotation) % k * p.b_row + j * p.b_column];
        sum += term, absolute += std::fabs(term);
      }
      expected[row * n + j] = sum * mask[row * n + j];
      magnitude[row * n + j] = absolute * mask[row * n + j];
    }
  }
  for (const bool accumulate : {false, true}) {
    p.accumulate = accumulate;
    const Workspace workspace(kernel.workspace(p, threads));
    p.workspace = workspace.data;
    with_whole_team([&] { kernel.run(p, threads); });
    // The mask, whose scale is 2, meets the sum of both.
    const int sums = accumulate ? (masked ? 3 : 2) : 1;
    // A sum is rounded as its terms are large, whatever they leave; and stored, here up to twice.
    constexpr double kSum = 8 * 0x1p-24, kStore = sizeof(C) == 2 ? 0x1p-7 : 0;
    const Values got = c.values();
    bool close = true;
    for (int64_t i = 0; i < m * n; ++i) {
      const double bound = sums * (kSum * magnitude[i] + kStore * std::fabs(expected[i]));
      close &= std::fabs(got[i] - sums * expected[i]) <= bound;
    }
    CHECK(close);
  }
}

}  // namespace

TEST(masks) {
  // Beginning anywhere in a block, of any length; and where the number of the block passes 2^32.
  for (const double p : {0.0, 0.3, 1 - 1e-12, 1.0}) {
    const auto rule = MaskRule::make(kSeed, p);
    for (const int64_t base : {int64_t{0}, (int64_t{1} << 34) - 40}) {
      for (int64_t begin = base; begin < base + 4; ++begin) {
        for (const int64_t count : {1, 3, 4, 5, 64, 65, 130, 2100}) {
          std::vector<float> floats(count);
          std::vector<double> doubles(count);
          const WeightDropout dropout = {&kSeed, p};
          cpu::kernels().mask_float(dropout, begin, begin + count, floats.data());
          cpu::kernels().mask_double(dropout, begin, begin + count, doubles.data());
          for (int64_t i = 0; i < count; ++i) {
            const int64_t element = begin + i;
            auto block = philox_counter(static_cast<uint64_t>(element / 4));
            philox4x32_10(block, rule.seed);
            const double factor = rule.keeps(block.word[element % 4]) ? rule.scale : 0;
            CHECK(floats[i] == static_cast<float>(factor) && doubles[i] == factor);
          }
        }
      }
    }
  }
}

TEST(masks_of_several_threads) {
  constexpr int64_t kElements = 100003;
  const Drawn drawn(0.5, kElements);
  std::vector<float> mask(kElements);
  cpu::kernels().mask_float(drawn.dropout, 0, kElements, mask.data());
  int64_t wrong = 0;
  for (int64_t i = 0; i < kElements; ++i) {
    wrong += (drawn.kept[i / 8] >> i % 8 & 1) != (mask[i] != 0);
  }
  CHECK(wrong == 0);
}

// However many threads share them, rows that are packed or summed need memory once, and those that
// are read where they lie none.
TEST(products_of_many_threads_need_little_memory) {
  const auto &floats = cpu::kernels(DType::kFloat32, false),
             &halves = cpu::kernels(DType::kFloat16, false);
  cpu::ProductParams turned{};
  turned.m = 393, turned.n = 77, turned.k = 231;
  turned.a_row = 1, turned.a_column = turned.m, turned.b_row = turned.n, turned.b_column = 1;
  // b, of at most two panels; sums for a panel; a.
  const int64_t rows = turned.m + 8 * 16, terms = turned.k + 17;
  const int64_t without_a = 4 * (128 * terms + rows * 64);
  CHECK(floats.sums.workspace(turned, 8) < without_a);
  CHECK(halves.gates.workspace(turned, 8) < without_a + 4 * rows * terms);
  cpu::ProductParams straight{};
  straight.m = 560, straight.n = 1200, straight.k = 1150;
  straight.a_row = straight.k, straight.a_column = 1;
  straight.b_row = 1, straight.b_column = straight.k;
  CHECK(floats.sums.workspace(straight, 2) < (int64_t{4} << 20));
}

TEST(products) {
  struct Size {
    int64_t m, n, k;
  };
  const auto& floats = cpu::kernels(DType::kFloat32, false);
  const auto& halves = cpu::kernels(DType::kFloat16, false);
  const auto& pairs = cpu::kernels(DType::kBFloat16, true);
  for (const auto [m, n, k] : {Size{1, 1, 1}, Size{7, 70, 33}, Size{130, 65, 300}, Size{5, 3, 0},
                               Size{300, 20, 1900}, Size{40, 70, 33},
                               // of three parts, one has a row more than a block has
                               Size{3 * 240 + 1, 20, 100}, Size{3 * 120 + 1, 20, 100}}) {
    for (const int layout : {0, 1, 2, 3}) {
      for (const int threads : {1, 3}) {
        const auto check = [&](bool masked) {
          check_product<BFloat16, float>(pairs.gates, m, n, k, layout, masked, threads);
          check_product<BFloat16, BFloat16>(pairs.grads, m, n, k, layout, masked, threads);
        };
        for (const bool masked : {false, true}) {
          check_product<float, float>(floats.gates, m, n, k, layout, masked, threads);
          check_product<Float16, float>(halves.gates, m, n, k, layout, masked, threads);
          if (!has_pairs()) continue;
          check(masked);
          {
            const PlainMatrixUnit unit;
            check(masked);
          }
          if (!has_unit()) continue;
          const WithMatrixUnit unit(cpu::kernels().matrix_unit);
          check(masked);
        }
      }
    }
  }
}
