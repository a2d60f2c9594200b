// A sequence by its definition, a loop over steps, rows and units in double, for the kernels of any
// device to be compared with; and the arrays that they are given.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/half.h"
#include "philox.h"
#include "sequence.h"

namespace lstmx {

using Values = std::vector<double>;

inline std::mt19937 random_bits(3);

inline Values normal_values(int64_t count, double scale = 1) {
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
  bool from_zero = false;  // the initial h

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

inline constexpr int64_t kSeed = -77;

// The definition, one unit at a time.
template <class Cell>
void run_plainly(const Sequence& q, Arrays<Cell>& a) {
  constexpr int G = Cell::kGates, S = Cell::kStates, D = Cell::kGrads;
  const int64_t H = q.H, T = q.T(), N = q.N();
  Values w = a.w_hh;
  if (q.p > 0) {
    const auto rule = MaskRule::make(kSeed, q.p);
    for (int64_t e = 0; e < G * H * H; ++e) {
      auto block = philox_counter(e / 4);
      philox4x32_10(block, rule.seed);
      w[e] *= rule.keeps(block.word[e % 4]) ? rule.scale : 0;
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

inline double worst(const Values& got, const Values& expected) {
  double result = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(got[i] - expected[i]) / (1 + std::fabs(expected[i]));
    result = std::isnan(error) ? INFINITY : std::max(result, error);
  }
  return result;
}

// Random values for everything that goes in, and what comes out of them.
template <class Cell>
Arrays<Cell> random_arrays(const Sequence& q) {
  constexpr int G = Cell::kGates;
  const int64_t H = q.H, N = q.N(), B = q.B();
  Arrays<Cell> a;
  a.x_gates = normal_values(N * G * H);
  a.w_hh = normal_values(G * H * H, 0.5 / std::sqrt(double(H)));
  a.b_ih = normal_values(G * H), a.b_hh = normal_values(G * H);
  for (int k = 0; k < Cell::kStates; ++k) {
    a.initial[k] = normal_values(B * H);
    a.dstates[k] = normal_values(N * H), a.dlast[k] = normal_values(B * H);
  }
  if (q.from_zero) a.initial[0].assign(B * H, 0);
  run_plainly(q, a);
  return a;
}

// Rounding errors: of the storage type, carried through a few steps.
template <class Storage>
constexpr double sequence_tolerance() {
  return sizeof(Storage) == 8               ? 1e-13
         : sizeof(Storage) == 4             ? 2e-5
         : std::is_same_v<Storage, Float16> ? 2e-2
                                            : 1.5e-1;
}

// Every kind of sequence, with odd sizes.
inline const Sequence kSequences[] = {
    {1, {1}, false, false, 0},
    {3, {2, 2}, true, false, 0.5},
    {17, {7, 7, 7}, false, false, 0.3},
    {65, {9, 9, 9, 9}, false, false, 0},
    {33, {8, 5, 5, 1}, false, true, 0.5},
    {40, {13, 12, 3, 3}, true, true, 0},
    {20, {6, 6, 6}, false, false, 0.3, true},
    {33, {8, 5, 5, 1}, true, true, 0, true},
};

}  // namespace lstmx
