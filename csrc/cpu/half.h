// 16-bit storage types as bit patterns, and their conversions. gcc 12 has no __bf16 and not every
// target has _Float16, so both are spelled out; plain integer code vectorizes.
#pragma once

#include <cstdint>
#include <cstring>

#include "../cells/math.h"

namespace lstmx {

struct BFloat16 {
  uint16_t bits;
};
// The same on processors that may lack instructions for it.
struct PlainBFloat16 : BFloat16 {};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
LSTMX_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Of a scalar, or of a vector at once: Float and Word are float and uint32_t, or as many of each.
template <class Float, class Word>
LSTMX_HD Float widen_bfloat16(Word bits) {
  return bit_cast<Float>(bits << 16);
}

template <class Float, class Word>
LSTMX_HD Float widen_float16(Word bits) {
  const Word sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
  // Shifted into place, the exponent is 112 too small; one multiplication mends it, subnormals too.
  const Float scaled = bit_cast<Float>(magnitude << 13) * 0x1p112f;
  const Word special = 0x7F800000u | (magnitude & 0x3FFu) << 13;
  return bit_cast<Float>((magnitude >= 0x7C00u ? special : bit_cast<Word>(scaled)) | sign);
}

// Round to nearest, ties to even, as ATen does; a NaN stays a NaN. The result is in the low bits.
template <class Word, class Float>
LSTMX_HD Word narrow_bfloat16(Float x) {
  const Word bits = bit_cast<Word>(x), rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits - bits + 0x7FC0u : rounded;
}

template <class Word, class Float>
LSTMX_HD Word narrow_float16(Float x) {
  const Word bits = bit_cast<Word>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  // Subnormal results: adding 0.5 (whose last bit is float16's smallest step) rounds them in place.
  const Word small = bit_cast<Word>(bit_cast<Float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const Word normal = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  const Word none = bits - bits;
  Word result = magnitude < (113u << 23) ? small : normal;
  result = magnitude >= 0x477FF000u ? none + 0x7C00u : result;
  return (magnitude > 0x7F800000u ? none + 0x7E00u : result) | sign;
}

LSTMX_HD float widen(float x) { return x; }
LSTMX_HD double widen(double x) { return x; }
LSTMX_HD float widen(BFloat16 x) { return widen_bfloat16<float>(uint32_t{x.bits}); }
LSTMX_HD float widen(Float16 x) { return widen_float16<float>(uint32_t{x.bits}); }

LSTMX_HD void narrow(float x, float& out) { out = x; }
LSTMX_HD void narrow(double x, double& out) { out = x; }
LSTMX_HD void narrow(float x, BFloat16& out) {
  out.bits = static_cast<uint16_t>(narrow_bfloat16<uint32_t>(x));
}
LSTMX_HD void narrow(float x, Float16& out) {
  out.bits = static_cast<uint16_t>(narrow_float16<uint32_t>(x));
}

// The type that arithmetic on a storage type is done in.
template <class Storage>
using ComputeOf = decltype(widen(Storage{}));

}  // namespace lstmx
