// Numbers of 16 bits and their conversion from and to float, rounding to nearest even.
//
// In an anonymous namespace and always inlined: what includes this is compiled for several
// instruction sets, and a shared copy compiled for the widest could be the one that the linker keeps.
#pragma once

#include <cstdint>

#define DREAM_INLINE inline __attribute__((always_inline))

namespace dream {
namespace {

struct Float32 {
  using Storage = float;
  static DREAM_INLINE float to_float(float x) { return x; }
  static DREAM_INLINE float from_float(float x) { return x; }
};

DREAM_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

DREAM_INLINE float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

struct BFloat16 {
  using Storage = uint16_t;
  static DREAM_INLINE float to_float(uint16_t x) { return bits_float(uint32_t{x} << 16); }
  static DREAM_INLINE uint16_t from_float(float x) {
    const uint32_t bits = float_bits(x);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static DREAM_INLINE float to_float(uint16_t x) {
    const uint32_t magnitude = x & 0x7fff;
    const uint32_t sign = uint32_t{x & 0x8000u} << 16;
    // Shifted into place the exponent is 112 too small; multiplying also normalises subnormals.
    const float scaled = bits_float(magnitude << 13) * 0x1p112f;
    const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u : 0;
    return bits_float(float_bits(scaled) | special | sign);
  }
  static DREAM_INLINE uint16_t from_float(float x) {
    const uint32_t bits = float_bits(x);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 0x38800000) {
      // Subnormal: adding 1/2 rounds to a multiple of 2^-24 and leaves it in the low bits.
      return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
  }
};

}  // namespace
}  // namespace dream
