// Long short-term memory (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000),
// one unit of one row. V is a scalar, a SIMD vector or an ATen tensor.
#pragma once

#include "math.h"

namespace lstmx {

struct Lstm {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4;   // rows of W_ih and W_hh per unit, in torch's order: i f g o
  static constexpr int kStates = 2;  // h, c; state 0 is always the output that W_hh sees
  static constexpr int kSaved = 4;   // values per unit that backward needs: i f g o, activated
  static constexpr int kGrads = 4;   // gradients of pre-activations per unit: i f g o
  static constexpr bool kHalvesAdd = true;  // forward takes x and h only as x[g] + h[g]
  // First of the kGates consecutive gradients that W_ih (W_hh) sees, and how far W_ih's are rotated
  // right of torch's order.
  static constexpr int kInputGrads = 0, kHiddenGrads = 0, kInputRotation = 0;

  // x = W_ih x_t + b_ih and h = W_hh h_{t-1} + b_hh of this unit; prev and next are its states.
  template <class V>
  LSTMX_HD static void forward(const V (&x)[kGates], const V (&h)[kGates], const V (&prev)[kStates],
                               V (&next)[kStates], V (&saved)[kSaved]) {
    const V i = sigmoid(x[0] + h[0]);
    const V f = sigmoid(x[1] + h[1]);
    const V g = tanh(x[2] + h[2]);
    const V o = sigmoid(x[3] + h[3]);
    next[1] = f * prev[1] + i * g;
    next[0] = o * tanh(next[1]);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  // dnext are the gradients of next; dprev receives what reaches prev other than through W_hh.
  template <class V>
  LSTMX_HD static void backward(const V (&saved)[kSaved], const V (&prev)[kStates],
                                const V (&next)[kStates], const V (&dnext)[kStates],
                                V (&dgates)[kGrads], V (&dprev)[kStates]) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(next[1]);
    const V dc = dnext[1] + dnext[0] * o * (1 - tanh_c * tanh_c);
    dgates[0] = dc * g * i * (1 - i);
    dgates[1] = dc * prev[1] * f * (1 - f);
    dgates[2] = dc * i * (1 - g * g);
    dgates[3] = dnext[0] * tanh_c * o * (1 - o);
    dprev[0] = V(0);
    dprev[1] = dc * f;
  }
};

}  // namespace lstmx
