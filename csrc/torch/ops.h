// The internal ops as the dispatcher calls them. A device registers both with its own computation.
#pragma once

#include <torch/library.h>

#include <string>
#include <string_view>

#include "sequence.h"

// The library that the ops belong to; the emulator's build has one of its own.
#if !defined(LSTMX_LIBRARY)
#define LSTMX_LIBRARY lstmx
#endif
#define LSTMX_QUOTE_(name) #name
#define LSTMX_QUOTE(name) LSTMX_QUOTE_(name)
#define LSTMX_OP(name) LSTMX_QUOTE(LSTMX_LIBRARY) "::" name
#define LSTMX_DEFINE_LIBRARY_(library, m) TORCH_LIBRARY(library, m)
#define LSTMX_DEFINE_LIBRARY(m) LSTMX_DEFINE_LIBRARY_(LSTMX_LIBRARY, m)
#define LSTMX_IMPLEMENT_(library, key, m) TORCH_LIBRARY_IMPL(library, key, m)
#define LSTMX_IMPLEMENT(key, m) LSTMX_IMPLEMENT_(LSTMX_LIBRARY, key, m)

// Arguments as all schemas list them.
#define LSTMX_TAIL                                                                           \
  const OptionalTensor &b_ih, const OptionalTensor &b_hh, const OptionalTensor &batch_sizes, \
      bool reverse, const OptionalTensor &seed, double weight_dropout

namespace lstmx {

using ForwardFn = ForwardResult(std::string_view, const Tensor&, const Tensor&,
                                const OptionalTensor&, const Tensor&, const Tensor&, LSTMX_TAIL,
                                c10::SymInt, bool);
using BackwardFn = BackwardResult(const OptionalTensor&, const OptionalTensor&,
                                  const OptionalTensor&, const OptionalTensor&, std::string_view,
                                  const Tensor&, const Tensor&, const OptionalTensor&,
                                  const Tensor&, const Tensor&, LSTMX_TAIL, const Tensor&,
                                  const Tensor&, const Tensor&, std::array<bool, kInputs>);

template <ForwardResult (*compute)(const SequenceArgs&, c10::SymInt saved_rows, bool cell_states)>
ForwardResult sequence_forward(std::string_view cell, const Tensor& x, const Tensor& h0,
                               const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                               LSTMX_TAIL, c10::SymInt saved_rows, bool cell_states) {
  return compute({std::string(cell), x, h0, c0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, seed,
                  weight_dropout},
                 std::move(saved_rows), cell_states);
}

template <BackwardResult (*compute)(const SequenceArgs&, const OutputGrads&, const Tensor& y,
                                    const Tensor& c, const Tensor& saved,
                                    std::array<bool, kInputs> needed)>
BackwardResult sequence_backward(const OptionalTensor& dy, const OptionalTensor& dh_n,
                                 const OptionalTensor& dc_n, const OptionalTensor& dc,
                                 std::string_view cell, const Tensor& x, const Tensor& h0,
                                 const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                                 LSTMX_TAIL, const Tensor& y, const Tensor& c, const Tensor& saved,
                                 std::array<bool, kInputs> needed) {
  return compute({std::string(cell), x, h0, c0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, seed,
                  weight_dropout},
                 {dy, dh_n, dc_n, dc}, y, c, saved, needed);
}

}  // namespace lstmx
