// Matrix products on a CUDA device, where torch has its handles and workspaces for them.
#pragma once

#include <cstdint>

#include "../sequence.h"

namespace lstmx {

// c [m, n] = a [m, k] b [k, n], or c += if `add`, for each of `count` of them. Of each of a and b
// one stride is 1.
struct Product {
  int64_t m, n, k;
  const void* a = nullptr;  // storage
  int64_t a_row = 0, a_column = 0;
  const void* b = nullptr;  // storage
  int64_t b_row = 0, b_column = 0;
  void* c = nullptr;  // compute, or storage if `narrow`
  int64_t c_row = 0;
  bool narrow = false, add = false;
  int64_t count = 1;
  int64_t a_next = 0, b_next = 0, c_next = 0;  // elements from one of them to the next
};

// On the current device and stream, which must not change while it lives. Sums are float32's or
// better; with tf32 the factors of float32 products are rounded to TF32.
class Blas {
 public:
  Blas(DType dtype, bool tf32);
  void multiply(const Product& product) const;

 private:
  DType dtype_;
  bool tf32_;
  void* handle_;
};

}  // namespace lstmx
