// SIMD vectors in GNU vector types: one source for every instruction set. The including file names
// its set in LSTMX_ISA and the width of a register in LSTMX_VECTOR_BYTES; all that is compiled with
// that set lives in the namespace of that name, so that the linker cannot mix two sets' copies.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../cells/math.h"
#include "half.h"

namespace lstmx::LSTMX_ISA {

#define LSTMX_INLINE inline __attribute__((always_inline))

typedef float RawFloat __attribute__((vector_size(LSTMX_VECTOR_BYTES)));
typedef double RawDouble __attribute__((vector_size(LSTMX_VECTOR_BYTES)));

template <class T>
struct Vec {
  static constexpr int kLanes = LSTMX_VECTOR_BYTES / sizeof(T);
  using Raw = std::conditional_t<std::is_same_v<T, float>, RawFloat, RawDouble>;
  Raw raw;

  Vec() = default;
  LSTMX_INLINE Vec(Raw r) : raw(r) {}
  LSTMX_INLINE explicit Vec(T x) : raw(x - Raw{}) {}

  LSTMX_INLINE friend Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  LSTMX_INLINE friend Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  LSTMX_INLINE friend Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  LSTMX_INLINE friend Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
  LSTMX_INLINE friend Vec operator-(int a, Vec b) { return T(a) - b.raw; }
};

// Sixteen-bit storage, a whole vector of it.
typedef uint16_t RawHalf __attribute__((vector_size(LSTMX_VECTOR_BYTES / 2)));
typedef uint32_t RawWord __attribute__((vector_size(LSTMX_VECTOR_BYTES)));

template <class Storage>
LSTMX_INLINE RawFloat widen_all(const Storage* p) {
  RawHalf halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  const auto words = __builtin_convertvector(halves, RawWord);
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    return widen_bfloat16<RawFloat>(words);
  } else {
    return widen_float16<RawFloat>(words);
  }
}

template <class Storage>
LSTMX_INLINE void narrow_all(RawFloat x, Storage* p) {
  RawWord words;
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    words = narrow_bfloat16<RawWord>(x);
  } else {
    words = narrow_float16<RawWord>(x);
  }
  const auto halves = __builtin_convertvector(words, RawHalf);
  __builtin_memcpy(p, &halves, sizeof(halves));
}

// Unaligned loads and stores, `count` of kLanes lanes (the rest read as zero); storage types are
// widened and narrowed on the way.
template <class T, class Storage>
LSTMX_INLINE Vec<T> load(const Storage* p, int64_t count = Vec<T>::kLanes) {
  Vec<T> v;
  if (count == Vec<T>::kLanes) {
    if constexpr (sizeof(Storage) == sizeof(T)) {
      __builtin_memcpy(&v, p, sizeof(v));
    } else {
      v.raw = widen_all(p);
    }
  } else {
    v = Vec<T>(T(0));
    for (int64_t i = 0; i < count; ++i) v.raw[i] = widen(p[i]);
  }
  return v;
}

// Calls body with the number of lanes that are left: with a constant where that is all of them, so
// that the loads and stores inside need no other way.
template <class T, class Body>
LSTMX_INLINE void with_lanes(int64_t left, Body&& body) {
  constexpr int64_t kAll = Vec<T>::kLanes;
  if (left >= kAll) {
    body(std::integral_constant<int64_t, kAll>{});
  } else {
    body(left);
  }
}

template <class T, class Storage>
LSTMX_INLINE void store(Storage* p, Vec<T> v, int64_t count = Vec<T>::kLanes) {
  if (count == Vec<T>::kLanes) {
    if constexpr (sizeof(Storage) == sizeof(T)) {
      __builtin_memcpy(p, &v, sizeof(v));
    } else {
      narrow_all(v.raw, p);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) narrow(v.raw[i], p[i]);
  }
}

// 2^(factor x) = scale * (1 + fraction), for -127 <= factor x <= 128.5. The scale is infinite from
// 127.5 on and 0 from -126.5 down, so that sigmoid's limits are exactly 0 and 1.
struct Exp2 {
  Vec<float> fraction, scale;
};

LSTMX_INLINE Exp2 exp2_parts(Vec<float> x, float factor) {
  const auto magic = Vec<float>(0x1.8p23f);  // adding it rounds to an integer in the low bits
  const auto shifted = x * Vec<float>(factor) + magic;
  const auto r = x * Vec<float>(factor) - (shifted - magic);
  // The bits of the magic number itself are shifted out.
  const RawWord scale = ((RawWord)shifted.raw << 23) + 0x3F800000u;
  // (2^r - 1) / r on [-1/2, 1/2], minimax in relative error (1.1e-8).
  auto p = Vec<float>(1.54035126187e-4f);
  p = p * r + Vec<float>(1.33907354754e-3f);
  p = p * r + Vec<float>(9.61823749418e-3f);
  p = p * r + Vec<float>(5.55035743365e-2f);
  p = p * r + Vec<float>(2.4022649795e-1f);
  p = p * r + Vec<float>(6.93147187927e-1f);
  return {p * r, (RawFloat)scale};
}

// A NaN passes through: the instructions, too, return their last operand then.
LSTMX_INLINE Vec<float> clamp(Vec<float> x, float least, float most) {
  const auto low = Vec<float>(least), high = Vec<float>(most);
#if LSTMX_VECTOR_BYTES == 64
  // Gcc makes a comparison and a blend of each of the expressions below.
  asm("vminps %1, %2, %0" : "=v"(x.raw) : "v"(x.raw), "v"(high.raw));
  asm("vmaxps %1, %2, %0" : "=v"(x.raw) : "v"(x.raw), "v"(low.raw));
  return x;
#else
  x = high.raw < x.raw ? high.raw : x.raw;
  return low.raw > x.raw ? low.raw : x.raw;
#endif
}

LSTMX_INLINE Vec<float> sigmoid(Vec<float> x) {
  const auto e = exp2_parts(clamp(x, -89.0f, 88.0f), -1.44269504088896341f);
  const auto one = Vec<float>(1.0f);
  return one / (one + (one + e.fraction) * e.scale);
}

// expm1(2x) / (expm1(2x) + 2), which keeps the relative accuracy of a small x.
LSTMX_INLINE Vec<float> tanh(Vec<float> x) {
  const auto e = exp2_parts(clamp(x, -10.0f, 10.0f), 2.88539008177792681f);
  const auto one = Vec<float>(1.0f);
  const auto expm1 = e.fraction * e.scale + (e.scale - one);
  return expm1 / (expm1 + Vec<float>(2.0f));
}

LSTMX_INLINE Vec<double> sigmoid(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.raw[i] = lstmx::sigmoid(double{x.raw[i]});
  return x;
}

LSTMX_INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.raw[i] = lstmx::tanh(double{x.raw[i]});
  return x;
}

}  // namespace lstmx::LSTMX_ISA
