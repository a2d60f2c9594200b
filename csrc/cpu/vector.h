// SIMD vectors in GNU vector types: one source for every instruction set. The including file names
// its set in LSTMX_ISA and the width of a register in LSTMX_VECTOR_BYTES; all that is compiled with
// that set lives in the namespace of that name, so that the linker cannot mix two sets' copies.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../cells/math.h"
#include "half.h"

namespace lstmx::LSTMX_ISA {

// Calls compile in a fraction of the time: for sanitizers and mutations.
#if defined(LSTMX_CALLS)
#define LSTMX_INLINE inline
#else
#define LSTMX_INLINE inline __attribute__((always_inline))
#endif
// One copy of a function that is called from many places, for the compiler's time.
#define LSTMX_CALL __attribute__((noinline))

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
LSTMX_INLINE RawFloat widen_all(RawHalf halves) {
  const auto words = __builtin_convertvector(halves, RawWord);
  if constexpr (std::is_base_of_v<BFloat16, Storage>) {
    return widen_bfloat16<RawFloat>(words);
  } else {
    return widen_float16<RawFloat>(words);
  }
}

template <class Storage>
LSTMX_INLINE RawHalf narrow_all(RawFloat x) {
#if LSTMX_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    RawHalf halves;  // subnormal numbers become zeros
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(x));
    return halves;
  }
#endif
  RawWord words;
  if constexpr (std::is_base_of_v<BFloat16, Storage>) {
    words = narrow_bfloat16<RawWord>(x);
  } else {
    words = narrow_float16<RawWord>(x);
  }
  return __builtin_convertvector(words, RawHalf);
}

// A vector as it lies in memory.
template <class T, class Storage>
using Stored = std::conditional_t<sizeof(Storage) == sizeof(T), typename Vec<T>::Raw, RawHalf>;

template <class T, class Storage>
LSTMX_INLINE Vec<T> from_storage(Stored<T, Storage> v) {
  if constexpr (sizeof(Storage) == sizeof(T)) {
    return v;
  } else {
    return widen_all<Storage>(v);
  }
}
template <class T, class Storage>
LSTMX_INLINE Stored<T, Storage> to_storage(Vec<T> v) {
  if constexpr (sizeof(Storage) == sizeof(T)) {
    return v.raw;
  } else {
    return narrow_all<Storage>(v.raw);
  }
}

// Unaligned loads and stores; storage types are widened and narrowed on the way.
template <class T, class Storage>
LSTMX_INLINE Vec<T> load(const Storage* p) {
  Stored<T, Storage> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return from_storage<T, Storage>(v);
}
template <class T, class Storage>
LSTMX_INLINE void store(Storage* p, Vec<T> v) {
  const auto to = to_storage<T, Storage>(v);
  __builtin_memcpy(p, &to, sizeof(to));
}

// The same of the first lanes; the rest read as zero.
struct Some {
  int64_t lanes;
};
#if LSTMX_VECTOR_BYTES == 64
template <class T, class Storage>
LSTMX_INLINE Vec<T> load(const Storage* p, Some some) {
  const uint32_t mask = (uint32_t{1} << some.lanes) - 1;
  if constexpr (sizeof(Storage) == 2) {
    return from_storage<T, Storage>((RawHalf)_mm256_maskz_loadu_epi16(__mmask16(mask), p));
  } else if constexpr (sizeof(Storage) == 4) {
    return (RawFloat)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  } else {
    return (RawDouble)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  }
}
template <class T, class Storage>
LSTMX_INLINE void store(Storage* p, Vec<T> v, Some some) {
  const uint32_t mask = (uint32_t{1} << some.lanes) - 1;
  if constexpr (sizeof(Storage) == 2) {
    _mm256_mask_storeu_epi16(p, __mmask16(mask), (__m256i)to_storage<T, Storage>(v));
  } else if constexpr (sizeof(Storage) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)v.raw);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)v.raw);
  }
}
#else
// A call, for it is rare: a matrix has one edge.
template <class T, class Storage>
LSTMX_CALL Vec<T> load(const Storage* p, Some some) {
  Storage all[Vec<T>::kLanes] = {};
  __builtin_memcpy(all, p, some.lanes * sizeof(Storage));
  return load<T>(all);
}
template <class T, class Storage>
LSTMX_CALL void store(Storage* p, Vec<T> v, Some some) {
  Storage all[Vec<T>::kLanes];
  store(all, v);
  __builtin_memcpy(p, all, some.lanes * sizeof(Storage));
}
#endif

// Of some or all.
template <class T, class Storage>
LSTMX_INLINE Vec<T> load(const Storage* p, int64_t lanes) {
  return lanes == Vec<T>::kLanes ? load<T>(p) : load<T>(p, Some{lanes});
}
template <class T, class Storage>
LSTMX_INLINE void store(Storage* p, Vec<T> v, int64_t lanes) {
  lanes == Vec<T>::kLanes ? store(p, v) : store(p, v, Some{lanes});
}

// Calls body with the lanes that are left: with a constant where that is all of them, so that the
// loads and stores inside go one way.
template <class T, class Body>
LSTMX_INLINE void with_lanes(int64_t left, Body&& body) {
  constexpr int64_t kAll = Vec<T>::kLanes;
  if (left >= kAll) {
    body(std::integral_constant<int64_t, kAll>{});
  } else {
    body(Some{left});
  }
}

// ---- Rows ---------------------------------------------------------------------------------------

// body(0), body(1), ...
template <int kCount, class Body>
LSTMX_INLINE void repeat(Body&& body) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) body(i);
}

// Vectors of a few rows that take every step together. A nonlinearity is a long chain of steps of
// four cycles each: chains that come one after the other fill the processor's scheduler with steps
// that must wait, which costs a third of the speed.
template <class T, int kCount>
struct Rows {
  Vec<T> row[kCount];

  Rows() = default;
  LSTMX_INLINE Rows(Vec<T> all) {
    repeat<kCount>([&](int i) __attribute__((always_inline)) { row[i] = all; });
  }
  LSTMX_INLINE explicit Rows(T x) : Rows(Vec<T>(x)) {}

  LSTMX_INLINE friend Rows operator+(const Rows& a, const Rows& b) {
    return each(a, [&](int i) __attribute__((always_inline)) { return a.row[i] + b.row[i]; });
  }
  LSTMX_INLINE friend Rows operator-(const Rows& a, const Rows& b) {
    return each(a, [&](int i) __attribute__((always_inline)) { return a.row[i] - b.row[i]; });
  }
  LSTMX_INLINE friend Rows operator*(const Rows& a, const Rows& b) {
    return each(a, [&](int i) __attribute__((always_inline)) { return a.row[i] * b.row[i]; });
  }
  LSTMX_INLINE friend Rows operator/(const Rows& a, const Rows& b) {
    return each(a, [&](int i) __attribute__((always_inline)) { return a.row[i] / b.row[i]; });
  }
  LSTMX_INLINE friend Rows operator-(int a, const Rows& b) {
    return each(b, [&](int i) __attribute__((always_inline)) { return a - b.row[i]; });
  }
};

// Longer runs need more registers than there are; doubles wait for the C library.
template <class T>
constexpr int kRowsTogether = std::is_same_v<T, float> ? LSTMX_VECTOR_REGISTERS / 8 : 1;

// Of rows like a's, row i is what body(i) gives.
template <class T, int kCount, class Body>
LSTMX_INLINE Rows<T, kCount> each(const Rows<T, kCount>&, Body&& body) {
  Rows<T, kCount> result;
  repeat<kCount>([&](int i) __attribute__((always_inline)) { result.row[i] = body(i); });
  return result;
}

// Calls body(rows, i), where rows is a compile-time constant, for rows i, i + 1, ... until there
// were `count`: by kMost as long as there are as many, then by fewer.
template <int kMost, class Body>
LSTMX_INLINE void by_rows(int64_t count, Body&& body, int64_t i = 0) {
  for (; i + kMost <= count; i += kMost) body(std::integral_constant<int, kMost>{}, i);
  if constexpr (kMost > 1) by_rows<kMost / 2>(count, body, i);
}

// ---- Nonlinearities -----------------------------------------------------------------------------

// The lesser (greater) of x and a bound, or x if that is NaN: the instructions, too, return their
// last operand then.
LSTMX_INLINE Vec<float> at_most(Vec<float> x, float bound) {
  const auto most = Vec<float>(bound);
#if LSTMX_VECTOR_BYTES > 16
  // Gcc makes a comparison and a blend of the expression below.
  asm("vminps %1, %2, %0" : "=v"(x.raw) : "v"(x.raw), "v"(most.raw));
  return x;
#else
  return most.raw < x.raw ? most.raw : x.raw;
#endif
}
LSTMX_INLINE Vec<float> at_least(Vec<float> x, float bound) {
  const auto least = Vec<float>(bound);
#if LSTMX_VECTOR_BYTES > 16
  asm("vmaxps %1, %2, %0" : "=v"(x.raw) : "v"(x.raw), "v"(least.raw));
  return x;
#else
  return least.raw > x.raw ? least.raw : x.raw;
#endif
}

template <int N>
LSTMX_INLINE Rows<float, N> clamp(const Rows<float, N>& x, float least, float most) {
  const auto low =
      each(x, [&](int i) __attribute__((always_inline)) { return at_most(x.row[i], most); });
  return each(x, [&](int i) __attribute__((always_inline)) { return at_least(low.row[i], least); });
}

// a / b of a b >= 1, to about a unit in the last place, and exactly 1 of equal ones, where
// products are fused.
template <int N>
LSTMX_INLINE Rows<float, N> quotient(const Rows<float, N>& a, const Rows<float, N>& b) {
#if LSTMX_VECTOR_BYTES == 64
  // Fewer cycles than a division: 14 bits, which a step of Newton's method doubles.
  const auto r = each(b, [&](int i) __attribute__((always_inline)) {
    Vec<float> rough;
    asm("vrcp14ps %1, %0" : "=v"(rough.raw) : "v"(b.row[i].raw));
    return rough;
  });
  // Of infinity r is 0 already; the two must not meet.
  const auto finite = each(b, [&](int i) __attribute__((always_inline)) {
    return at_most(b.row[i], std::numeric_limits<float>::max());
  });
  const auto q = a * r;
  return q - r * (finite * q - a);
#else
  return a / b;
#endif
}

// 2^(factor x) = scale * (1 + fraction), for -127 <= factor x <= 128.5. The scale is infinite from
// 127.5 on and 0 from -126.5 down, so that sigmoid's limits are exactly 0 and 1.
template <int N>
struct Exp2 {
  Rows<float, N> fraction, scale;
};

template <int N>
LSTMX_INLINE Exp2<N> exp2_parts(const Rows<float, N>& x, float factor) {
  using V = Rows<float, N>;
  const auto magic = V(0x1.8p23f);  // adding it rounds to an integer in the low bits
  const auto shifted = x * V(factor) + magic;
  const auto r = x * V(factor) - (shifted - magic);
  // (2^r - 1) / r on [-1/2, 1/2], minimax in relative error (1.1e-8).
  auto p = V(1.54035126187e-4f);
  p = p * r + V(1.33907354754e-3f);
  p = p * r + V(9.61823749418e-3f);
  p = p * r + V(5.55035743365e-2f);
  p = p * r + V(2.4022649795e-1f);
  p = p * r + V(6.93147187927e-1f);
  // Written where it stays: of a copy gcc moves words through memory.
  Exp2<N> e;
  e.fraction = p * r;
  repeat<N>([&](int i) __attribute__((always_inline)) {
    // The bits of the magic number itself are shifted out.
    e.scale.row[i] = (RawFloat)(((RawWord)shifted.row[i].raw << 23) + 0x3F800000u);
  });
  return e;
}

template <int N>
LSTMX_INLINE Rows<float, N> sigmoid(const Rows<float, N>& x) {
  const auto e = exp2_parts(clamp(x, -89.0f, 88.0f), -1.44269504088896341f);
  const auto one = Rows<float, N>(1.0f);
  return quotient(one, one + (one + e.fraction) * e.scale);
}

// expm1(2x) / (expm1(2x) + 2), which keeps the relative accuracy of a small x, and a zero's sign.
template <int N>
LSTMX_INLINE Rows<float, N> tanh(const Rows<float, N>& x) {
  const auto e = exp2_parts(clamp(x, -10.0f, 10.0f), 2.88539008177792681f);
  const auto expm1 = e.fraction * e.scale - (1 - e.scale);
  return quotient(expm1, expm1 + Rows<float, N>(2.0f));
}

template <int N>
LSTMX_INLINE Rows<double, N> sigmoid(Rows<double, N> x) {
  for (auto& v : x.row) {
    for (int i = 0; i < Vec<double>::kLanes; ++i) v.raw[i] = lstmx::sigmoid(double{v.raw[i]});
  }
  return x;
}

template <int N>
LSTMX_INLINE Rows<double, N> tanh(Rows<double, N> x) {
  for (auto& v : x.row) {
    for (int i = 0; i < Vec<double>::kLanes; ++i) v.raw[i] = lstmx::tanh(double{v.raw[i]});
  }
  return x;
}

}  // namespace lstmx::LSTMX_ISA
