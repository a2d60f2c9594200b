// The CPU kernels against a loop over steps, rows and units in double: every cell, dtype and kind
// of sequence, with one thread and with three.
#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "check.h"
#include "cpu/half.h"
#include "cpu/kernels.h"
#include "philox.h"

using namespace lstmx;

namespace {

using Values = std::vector<double>;

std::mt19937 random_bits(3);

Values normal_values(int64_t count, double scale = 1) {
  std::normal_distribution<double> normal(0, scale);
  Values values(count);
  for (double& v : values) v = normal(random_bits);
  return values;
}

struct Sequence {
  int64_t H;
  std::vector<int64_t> batch_sizes;
  bool reverse, packed;
  double p;

  int64_t T() const { return int64_t(batch_sizes.size()); }
  int64_t B() const { return batch_sizes[0]; }
  int64_t offset(int64_t t) const {
    int64_t rows = 0;
    for (int64_t i = 0; i < t; ++i) rows += batch_sizes[i];
    return rows;
  }
  int64_t N() const { return offset(T()); }
};

// Everything that goes in and comes out, as doubles.
template <class Cell>
struct Arrays {
  static constexpr int G = Cell::kGates, S = Cell::kStates;
  Values x_gates, w_hh, b_ih, b_hh, initial[S], dstates[S], dlast[S];
  Values states[S], last[S], saved, dgates, dinitial[S], dbias;
};

constexpr int64_t kSeed = -77;

// The definition, one unit at a time.
template <class Cell>
void run_plainly(const Sequence& q, Arrays<Cell>& a) {
  constexpr int G = Cell::kGates, S = Cell::kStates, D = Cell::kGrads;
  const int64_t H = q.H, T = q.T(), B = q.B(), N = q.N();
  Values w = a.w_hh;
  if (q.p > 0) {
    const auto rule = MaskRule::make(kSeed, q.p);
    for (int64_t e = 0; e < G * H * H; ++e) {
      auto block = philox_counters<1>(e / 4);
      philox4x32_10(block, rule.seed);
      w[e] *= rule.keeps(block.word[e % 4][0]) ? rule.scale : 0;
    }
  }
  for (int k = 0; k < S; ++k) {
    a.states[k].assign(N * H, 0), a.last[k] = a.initial[k], a.dinitial[k] = a.dlast[k];
  }
  a.saved.assign(N * Cell::kSaved * H, 0);
  a.dgates.assign(N * D * H, 0);
  a.dbias.assign(D * H, 0);
  std::vector<Values> before(T * S);  // each step's previous states
  for (int64_t i = 0; i < T; ++i) {
    const int64_t t = q.reverse ? T - 1 - i : i;
    for (int k = 0; k < S; ++k) before[t * S + k] = a.last[k];
    for (int64_t b = 0; b < q.batch_sizes[t]; ++b) {
      const int64_t row = q.offset(t) + b;
      for (int64_t u = 0; u < H; ++u) {
        double x[G], h[G], prev[S], next[S], saved[Cell::kSaved];
        for (int g = 0; g < G; ++g) {
          x[g] = a.x_gates[row * G * H + g * H + u] + a.b_ih[g * H + u];
          h[g] = a.b_hh[g * H + u];
          for (int64_t j = 0; j < H; ++j) {
            h[g] += w[(g * H + u) * H + j] * before[t * S][b * H + j];
          }
        }
        for (int k = 0; k < S; ++k) prev[k] = before[t * S + k][b * H + u];
        Cell::forward(x, h, prev, next, saved);
        for (int k = 0; k < S; ++k) {
          a.states[k][row * H + u] = a.last[k][b * H + u] = next[k];
        }
        for (int s = 0; s < Cell::kSaved; ++s) {
          a.saved[(row * Cell::kSaved + s) * H + u] = saved[s];
        }
      }
    }
  }
  for (int64_t i = T - 1; i >= 0; --i) {
    const int64_t t = q.reverse ? T - 1 - i : i;
    for (int64_t b = 0; b < q.batch_sizes[t]; ++b) {
      const int64_t row = q.offset(t) + b;
      for (int64_t u = 0; u < H; ++u) {
        double saved[Cell::kSaved], prev[S], next[S], dnext[S], dgates[D], dprev[S];
        for (int s = 0; s < Cell::kSaved; ++s) {
          saved[s] = a.saved[(row * Cell::kSaved + s) * H + u];
        }
        for (int k = 0; k < S; ++k) {
          prev[k] = before[t * S + k][b * H + u], next[k] = a.states[k][row * H + u];
          dnext[k] = a.dinitial[k][b * H + u] + a.dstates[k][row * H + u];
        }
        Cell::backward(saved, prev, next, dnext, dgates, dprev);
        for (int g = 0; g < D; ++g) {
          a.dgates[row * D * H + g * H + u] = dgates[g];
          a.dbias[g * H + u] += dgates[g];
        }
        for (int k = 0; k < S; ++k) a.dinitial[k][b * H + u] = dprev[k];
      }
      for (int64_t j = 0; j < H; ++j) {
        for (int64_t r = 0; r < G * H; ++r) {
          a.dinitial[0][b * H + j] +=
              w[r * H + j] * a.dgates[row * D * H + Cell::kHiddenGrads * H + r];
        }
      }
    }
  }
  (void)B;
}

// A buffer of exactly the right size, so that AddressSanitizer sees a step outside.
template <class T>
struct Buffer {
  explicit Buffer(const Values& values) : Buffer(int64_t(values.size())) {
    for (int64_t i = 0; i < size; ++i) {
      if constexpr (sizeof(T) == 2) {
        narrow(float(values[i]), data[i]);
      } else {
        data[i] = T(values[i]);
      }
    }
  }
  explicit Buffer(int64_t count) : size(count), data(new T[count]) {
    std::memset(static_cast<void*>(data.get()), 0xFF, count * sizeof(T));  // NaN in every format
  }
  Values values() const {
    Values result(size);
    for (int64_t i = 0; i < size; ++i) result[i] = widen(data[i]);
    return result;
  }
  int64_t size;
  std::unique_ptr<T[]> data;
};

struct Workspace {
  explicit Workspace(int64_t bytes) : data(new (std::align_val_t(64)) char[bytes]) {}
  ~Workspace() { operator delete[](data, std::align_val_t(64)); }
  char* data;
};

double worst(const Values& got, const Values& expected) {
  double result = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(got[i] - expected[i]) / (1 + std::fabs(expected[i]));
    result = std::isnan(error) ? INFINITY : std::max(result, error);
  }
  return result;
}

template <class Cell, class Storage>
void check_sequence(cpu::CellKind kind, DType dtype, const Sequence& q, int threads) {
  constexpr int G = Cell::kGates, S = Cell::kStates;
  using T = ComputeOf<Storage>;
  const int64_t H = q.H, N = q.N(), B = q.B();
  Arrays<Cell> a;
  a.x_gates = normal_values(N * G * H);
  a.w_hh = normal_values(G * H * H, 0.5 / std::sqrt(double(H)));
  a.b_ih = normal_values(G * H), a.b_hh = normal_values(G * H);
  for (int k = 0; k < S; ++k) {
    a.initial[k] = normal_values(B * H);
    a.dstates[k] = normal_values(N * H), a.dlast[k] = normal_values(B * H);
  }
  run_plainly(q, a);

  const auto& kernels = cpu::kernels().cells[int(kind)][int(dtype)];
  const SequenceShape shape = {q.T(), B, H, q.packed ? q.batch_sizes.data() : nullptr, q.reverse};
  const WeightDropout dropout = {q.p > 0 ? &kSeed : nullptr, q.p};
  Buffer<T> x_gates(a.x_gates);
  Buffer<Storage> w_hh(a.w_hh), b_ih(a.b_ih), b_hh(a.b_hh), saved(N * Cell::kSaved * H);
  std::vector<Buffer<Storage>> initial, states, last, dstates, dlast, dinitial;
  SequenceForwardParams f{};
  f.shape = shape, f.dropout = dropout;
  f.x_gates = x_gates.data.get(), f.x_gates_stride = G * H;
  f.w_hh = w_hh.data.get(), f.b_ih = b_ih.data.get(), f.b_hh = b_hh.data.get();
  f.saved = saved.data.get();
  for (int k = 0; k < S; ++k) {
    initial.emplace_back(a.initial[k]), states.emplace_back(N * H), last.emplace_back(B * H);
    dstates.emplace_back(a.dstates[k]), dlast.emplace_back(a.dlast[k]);
    dinitial.emplace_back(B * H);
    f.initial[k] = initial[k].data.get();
    f.states[k] = states[k].data.get(), f.last[k] = last[k].data.get();
  }
  const Workspace forward_workspace(kernels.forward_workspace(shape, threads));
  f.workspace = forward_workspace.data;
  kernels.forward(f, threads);

  Buffer<T> dgates(N * Cell::kGrads * H), dbias(Cell::kGrads * H);
  SequenceBackwardParams b{};
  b.shape = shape, b.dropout = dropout;
  b.w_hh = w_hh.data.get(), b.saved = saved.data.get();
  for (int k = 0; k < S; ++k) {
    b.initial[k] = initial[k].data.get(), b.states[k] = states[k].data.get();
    b.dstates[k] = dstates[k].data.get(), b.dlast[k] = dlast[k].data.get();
    b.dinitial[k] = dinitial[k].data.get();
  }
  b.dgates = dgates.data.get(), b.dbias = dbias.data.get();
  const Workspace backward_workspace(kernels.backward_workspace(shape, threads));
  b.workspace = backward_workspace.data;
  kernels.backward(b, threads);

  // Rounding errors: of the storage type, carried through a few steps.
  const double eps = sizeof(Storage) == 8               ? 1e-13
                     : sizeof(Storage) == 4             ? 2e-5
                     : std::is_same_v<Storage, Float16> ? 2e-2
                                                        : 1.5e-1;
  for (int k = 0; k < S; ++k) {
    CHECK(worst(states[k].values(), a.states[k]) < eps);
    CHECK(worst(last[k].values(), a.last[k]) < eps);
    CHECK(worst(dinitial[k].values(), a.dinitial[k]) < eps);
  }
  CHECK(worst(saved.values(), a.saved) < eps);
  CHECK(worst(dgates.values(), a.dgates) < eps);
  CHECK(worst(dbias.values(), a.dbias) < eps);
}

template <class Cell>
void check_cell(cpu::CellKind kind) {
  const Sequence sequences[] = {
      {1, {1}, false, false, 0},
      {3, {2, 2}, true, false, 0.5},
      {17, {7, 7, 7}, false, false, 0.3},
      {65, {9, 9, 9, 9}, false, false, 0},
      {33, {8, 5, 5, 1}, false, true, 0.5},
      {40, {13, 12, 3, 3}, true, true, 0},
  };
  for (const auto& q : sequences) {
    for (const int threads : {1, 3}) {
      check_sequence<Cell, float>(kind, DType::kFloat32, q, threads);
      check_sequence<Cell, double>(kind, DType::kFloat64, q, threads);
      check_sequence<Cell, BFloat16>(kind, DType::kBFloat16, q, threads);
      check_sequence<Cell, Float16>(kind, DType::kFloat16, q, threads);
    }
  }
}

}  // namespace

TEST(lstm_sequence) { check_cell<Lstm>(cpu::CellKind::kLstm); }
TEST(gru_sequence) { check_cell<Gru>(cpu::CellKind::kGru); }

// Large enough for a team, both ways of sharing the work.
TEST(teams) {
  check_sequence<Lstm, float>(cpu::CellKind::kLstm, DType::kFloat32,
                              {96, {16, 16, 16}, false, false, 0.5}, 3);
  check_sequence<Gru, float>(cpu::CellKind::kGru, DType::kFloat32,
                             {320, {6, 6, 5, 1}, true, true, 0.5}, 3);
}

TEST(products) {
  struct Size {
    int64_t m, n, k;
  };
  for (const auto [m, n, k] : {Size{1, 1, 1}, Size{7, 70, 33}, Size{130, 65, 300}, Size{5, 3, 0}}) {
    for (const int layout : {0, 1, 2, 3}) {
      for (const int threads : {1, 3}) {
        const Values a = normal_values(m * k), b = normal_values(k * n);
        const Buffer<float> a_data(a), b_data(b);
        Buffer<float> c(m * n);
        cpu::ProductParams p{m,
                             n,
                             k,
                             a_data.data.get(),
                             0,
                             0,
                             b_data.data.get(),
                             0,
                             0,
                             c.data.get(),
                             n,
                             {&kSeed, 0.5},
                             nullptr};
        p.a_row = layout & 1 ? 1 : k, p.a_column = layout & 1 ? m : 1;
        p.b_row = layout & 2 ? 1 : n, p.b_column = layout & 2 ? k : 1;
        const auto& kernel = cpu::kernels().storage_product[int(DType::kFloat32)];
        const Workspace workspace(kernel.workspace(p, threads));
        p.workspace = workspace.data;
        kernel.run(p, threads);

        std::vector<float> mask(m * n);
        cpu::kernels().mask_float(p.dropout, 0, m * n, mask.data());
        Values expected(m * n);
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            for (int64_t l = 0; l < k; ++l) {
              expected[i * n + j] +=
                  a[i * p.a_row + l * p.a_column] * b[l * p.b_row + j * p.b_column];
            }
            expected[i * n + j] *= mask[i * n + j];
          }
        }
        CHECK(worst(c.values(), expected) < 1e-4);
      }
    }
  }
}
