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

LSTMX_HD float widen(float x) { return x; }
LSTMX_HD double widen(double x) { return x; }
LSTMX_HD float widen(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
LSTMX_HD float widen(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7FFFu;
  // Shifted into place, the exponent is 112 too small; one multiplication mends it, subnormals too.
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t bits =
      magnitude >= 0x7C00u ? 0x7F800000u | (magnitude & 0x3FFu) << 13 : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | sign);
}

// Round to nearest, ties to even, as ATen does; a NaN stays a NaN.
LSTMX_HD void narrow(float x, float& out) { out = x; }
LSTMX_HD void narrow(double x, double& out) { out = x; }
LSTMX_HD void narrow(float x, BFloat16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}
LSTMX_HD void narrow(float x, Float16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Subnormal results: adding 0.5 (whose last bit is float16's smallest step) rounds them in place.
  const uint32_t small =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  uint32_t result = magnitude < (113u << 23) ? small : normal;
  result = magnitude >= 0x477FF000u ? 0x7C00u : result;
  result = magnitude > 0x7F800000u ? 0x7E00u : result;
  out.bits = static_cast<uint16_t>(result | sign);
}

// The type that arithmetic on a storage type is done in.
template <class Storage>
using ComputeOf = decltype(widen(Storage{}));

}  // namespace lstmx
