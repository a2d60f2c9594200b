// The cells' backward against finite differences of their forward, in double.
#include <random>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "check.h"

using lstmx::Gru;
using lstmx::Lstm;

namespace {

template <class Cell>
struct Unit {
  double x[Cell::kGates], h[Cell::kGates], prev[Cell::kStates];
  double next[Cell::kStates], saved[Cell::kSaved];

  void forward() { Cell::forward(x, h, prev, next, saved); }
};

// The slope of sum_k weight[k] * next[k] in `input`, one of the unit's numbers.
template <class Cell>
double slope(const Unit<Cell>& unit, const double& input, const double (&weight)[Cell::kStates]) {
  constexpr double kStep = 1e-6;
  const auto index = &input - reinterpret_cast<const double*>(&unit);
  double loss[2] = {0, 0};
  for (int side = 0; side < 2; ++side) {
    Unit<Cell> moved = unit;
    reinterpret_cast<double*>(&moved)[index] += side == 0 ? -kStep : kStep;
    moved.forward();
    for (int k = 0; k < Cell::kStates; ++k) loss[side] += weight[k] * moved.next[k];
  }
  return (loss[1] - loss[0]) / (2 * kStep);
}

template <class Cell>
void check_backward() {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (int trial = 0; trial < 200; ++trial) {
    Unit<Cell> unit;
    double dnext[Cell::kStates], dgates[Cell::kGrads], dprev[Cell::kStates];
    for (double& v : unit.x) v = normal(random);
    for (double& v : unit.h) v = normal(random);
    for (double& v : unit.prev) v = normal(random);
    for (double& v : dnext) v = normal(random);
    unit.forward();
    Cell::backward(unit.saved, unit.prev, unit.next, dnext, dgates, dprev);

    for (int g = 0; g < Cell::kGates; ++g) {
      const int column = Cell::kInputGrads + (g + Cell::kInputRotation) % Cell::kGates;
      CHECK_NEAR(dgates[column], slope(unit, unit.x[g], dnext), 1e-8);
      CHECK_NEAR(dgates[Cell::kHiddenGrads + g], slope(unit, unit.h[g], dnext), 1e-8);
    }
    for (int k = 0; k < Cell::kStates; ++k) {
      CHECK_NEAR(dprev[k], slope(unit, unit.prev[k], dnext), 1e-8);
    }
  }
}

}  // namespace

TEST(lstm_backward_is_the_slope_of_forward) { check_backward<Lstm>(); }
TEST(gru_backward_is_the_slope_of_forward) { check_backward<Gru>(); }

TEST(lstm_by_hand) {
  const double x[] = {0.5, -0.25, 1.0, 0.75}, h[] = {0, 0.5, -0.5, 0.25}, prev[] = {0.1, -0.6};
  double next[2], saved[4];
  Lstm::forward(x, h, prev, next, saved);
  const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
  const double c = sigmoid(0.25) * -0.6 + sigmoid(0.5) * std::tanh(0.5);
  CHECK_NEAR(next[1], c, 1e-15);
  CHECK_NEAR(next[0], sigmoid(1.0) * std::tanh(c), 1e-15);
}

TEST(gru_by_hand) {
  const double x[] = {0.5, -0.25, 1.0}, h[] = {0.25, 0.5, -0.5}, prev[] = {0.3};
  double next[1], saved[4];
  Gru::forward(x, h, prev, next, saved);
  const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
  const double z = sigmoid(0.25), n = std::tanh(1.0 + sigmoid(0.75) * -0.5);
  CHECK_NEAR(next[0], (1 - z) * n + z * 0.3, 1e-15);
}
