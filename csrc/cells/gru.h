// Gated recurrent unit (Cho et al. 2014) as cuDNN and torch define it: the reset gate multiplies
// W_hn h + b_hn. One unit of one row; V is a scalar, a SIMD vector or an ATen tensor.
#pragma once

#include "math.h"

namespace lstmx {

struct Gru {
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3;   // rows of W_ih and W_hh per unit, in torch's order: r z n
  static constexpr int kStates = 1;  // h
  static constexpr int kSaved = 4;   // r z n, activated, and W_hn h + b_hn
  static constexpr int kGrads = 4;   // n (as W_ih sees it) r z n (as W_hh sees it)
  static constexpr bool kHalvesAdd = false;  // r comes between those of n
  // W_ih's gates are columns 0..2, in the order n r z: one GEMM serves each weight without a copy.
  static constexpr int kInputGrads = 0, kHiddenGrads = 1, kInputRotation = 1;

  // See Lstm::forward.
  template <class V>
  LSTMX_HD static void forward(const V (&x)[kGates], const V (&h)[kGates], const V (&prev)[kStates],
                               V (&next)[kStates], V (&saved)[kSaved]) {
    const V r = sigmoid(x[0] + h[0]);
    const V z = sigmoid(x[1] + h[1]);
    const V n = tanh(x[2] + r * h[2]);
    next[0] = n + z * (prev[0] - n);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = h[2];
  }

  // See Lstm::backward.
  template <class V>
  LSTMX_HD static void backward(const V (&saved)[kSaved], const V (&prev)[kStates],
                                const V (&)[kStates], const V (&dnext)[kStates],
                                V (&dgates)[kGrads], V (&dprev)[kStates]) {
    const V r = saved[0], z = saved[1], n = saved[2], hn = saved[3];
    const V dn = dnext[0] * (1 - z) * (1 - n * n);
    dgates[0] = dn;
    dgates[1] = dn * hn * r * (1 - r);
    dgates[2] = dnext[0] * (prev[0] - n) * z * (1 - z);
    dgates[3] = dn * r;
    dprev[0] = dnext[0] * z;
  }
};

}  // namespace lstmx
