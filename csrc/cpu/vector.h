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
typedef uint32_t RawWord __attribute__((vector_size(LSTMX_VECTOR_BYTES)));
typedef uint64_t RawLong __attribute__((vector_size(LSTMX_VECTOR_BYTES)));

template <class T>
struct Vec {
  static constexpr int kLanes = LSTMX_VECTOR_BYTES / sizeof(T);
  using Raw = std::conditional_t<std::is_same_v<T, float>, RawFloat, RawDouble>;
  using Bits = std::conditional_t<std::is_same_v<T, float>, RawWord, RawLong>;
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
#pragma GCC unroll 32
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

// Longer runs need more registers than there are.
constexpr int kRowsTogether = LSTMX_VECTOR_REGISTERS / 8;

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
template <class T>
LSTMX_INLINE Vec<T> at_most(Vec<T> x, T bound) {
  const auto most = Vec<T>(bound);
#if LSTMX_VECTOR_BYTES > 16
  // Gcc makes a comparison and a blend of the expression below.
  if constexpr (std::is_same_v<T, float>) {
    asm("vminps %1, %2, %0" : "=v"(x.raw) : "v"(x.raw), "v"(most.raw));
  } else {
    asm("vminpd %1, %2, %0" : "=v"(x.raw) : "v"(x.raw), "v"(most.raw));
  }
  return x;
#else
  return most.raw < x.raw ? most.raw : x.raw;
#endif
}
template <class T>
LSTMX_INLINE Vec<T> at_least(Vec<T> x, T bound) {
  const auto least = Vec<T>(bound);
#if LSTMX_VECTOR_BYTES > 16
  if constexpr (std::is_same_v<T, float>) {
    asm("vmaxps %1, %2, %0" : "=v"(x.raw) : "v"(x.raw), "v"(least.raw));
  } else {
    asm("vmaxpd %1, %2, %0" : "=v"(x.raw) : "v"(x.raw), "v"(least.raw));
  }
  return x;
#else
  return least.raw > x.raw ? least.raw : x.raw;
#endif
}

template <class T, int N>
LSTMX_INLINE Rows<T, N> clamp(const Rows<T, N>& x, T least, T most) {
  const auto low =
      each(x, [&](int i) __attribute__((always_inline)) { return at_most(x.row[i], most); });
  return each(x, [&](int i) __attribute__((always_inline)) { return at_least(low.row[i], least); });
}

// a / b of a b >= 1, to about a unit in the last place, and exactly 1 of equal ones, where
// products are fused.
template <class T, int N>
LSTMX_INLINE Rows<T, N> quotient(const Rows<T, N>& a, const Rows<T, N>& b) {
#if LSTMX_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
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
  }
#endif
  return a / b;
}

// What a type brings to e^y = 2^n (1 + r p(r)), where n is an integer and r the remainder.
template <class T>
struct Exp;

template <>
struct Exp<float> {
  static constexpr float kLog2E = 1.44269504088896341f;
  // Beyond them sigmoid, and tanh on either side, have reached their limits.
  static constexpr float kSigmoidLeast = -89, kSigmoidMost = 88, kTanhMost = 10;
  // (2^r - 1) / r on [-1/2, 1/2], minimax in relative error (1.1e-8); the highest power first.
  static constexpr float kTerms[] = {1.54035126187e-4f, 1.33907354754e-3f, 9.61823749418e-3f,
                                     5.55035743365e-2f, 2.4022649795e-1f,  6.93147187927e-1f};

  template <class V>
  LSTMX_INLINE static V remainder(const V& x, float factor, const V& n) {
    return x * V(factor * kLog2E) - n;
  }
};

template <>
struct Exp<double> {
  static constexpr double kLog2E = 1.44269504088896341;
  static constexpr double kSigmoidLeast = -710, kSigmoidMost = 709, kTanhMost = 20;
  // The first part of ln 2 has 42 bits, so that nothing is lost when n times it is taken off.
  static constexpr double kLn2 = 0x1.62e42fefa38p-1, kLn2Rest = 0x1.ef35793c7673p-45;
  // (e^r - 1) / r on [-ln 2 / 2, ln 2 / 2], minimax in relative error (9.2e-19) among those that
  // are 1 at 0; by Remez's exchange.
  static constexpr double kTerms[] = {2.0875330791085477e-9,
                                      2.510896771489803e-8,
                                      2.755740260826029e-7,
                                      2.7557244403542748e-6,
                                      2.4801587172616534e-5,
                                      1.9841269885939673e-4,
                                      1.3888888888962312e-3,
                                      8.3333333333217e-3,
                                      4.166666666666651e-2,
                                      1.6666666666666677e-1,
                                      0.5,
                                      1};

  template <class V>
  LSTMX_INLINE static V remainder(const V& x, double factor, const V& n) {
    return x * V(factor) - n * V(kLn2) - n * V(kLn2Rest);
  }
};

// e^(factor x) = scale * (1 + fraction), for n from -127 (-1023) to 128 (1024). At the ends the
// scale is 0 and infinite, so that sigmoid's limits are exactly 1 and 0.
template <class T, int N>
struct ExpParts {
  Rows<T, N> fraction, scale;
};

template <class T, int N>
LSTMX_INLINE ExpParts<T, N> exp_parts(const Rows<T, N>& x, T factor) {
  using V = Rows<T, N>;
  // Adding it rounds to an integer in the low bits.
  const auto magic = V(T(1.5) / std::numeric_limits<T>::epsilon());
  const auto shifted = x * V(factor * Exp<T>::kLog2E) + magic;
  const auto r = Exp<T>::remainder(x, factor, shifted - magic);
  auto p = V(Exp<T>::kTerms[0]);
  constexpr int kCount = sizeof(Exp<T>::kTerms) / sizeof(T);
#pragma GCC unroll 16
  for (int i = 1; i < kCount; ++i) p = p * r + V(Exp<T>::kTerms[i]);
  // Written where it stays: of a copy gcc moves words through memory.
  ExpParts<T, N> e;
  e.fraction = p * r;
  repeat<N>([&](int i) __attribute__((always_inline)) {
    using Bits = typename Vec<T>::Bits;
    // The bits of the magic number itself are shifted out.
    const auto exponent = (Bits)shifted.row[i].raw << (std::numeric_limits<T>::digits - 1);
    e.scale.row[i] = (typename Vec<T>::Raw)(exponent + (Bits)Vec<T>(T(1)).raw);
  });
  return e;
}

template <class T, int N>
LSTMX_INLINE Rows<T, N> sigmoid(const Rows<T, N>& x) {
  const auto e = exp_parts(clamp(x, Exp<T>::kSigmoidLeast, Exp<T>::kSigmoidMost), T(-1));
  const auto one = Rows<T, N>(T(1));
  return quotient(one, one + (one + e.fraction) * e.scale);
}

// expm1(2x) / (expm1(2x) + 2), which keeps the relative accuracy of a small x, and a zero's sign.
template <class T, int N>
LSTMX_INLINE Rows<T, N> tanh(const Rows<T, N>& x) {
  const auto e = exp_parts(clamp(x, -Exp<T>::kTanhMost, Exp<T>::kTanhMost), T(2));
  const auto expm1 = e.fraction * e.scale - (1 - e.scale);
  return quotient(expm1, expm1 + Rows<T, N>(T(2)));
}

}  // namespace lstmx::LSTMX_ISA
