// Between the caller's tensors and float32 scratch.
#pragma once

#include "vector.h"

namespace dream::cpu {
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

// Reads n elements and zero-fills up to `padded`.
template <typename Type>
DREAM_INLINE void load_elements(const void* source, int64_t stride, int64_t n, int64_t padded,
                                float* target) {
  const auto* s = static_cast<const typename Type::Storage*>(source);
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) target[i] = Type::to_float(s[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) target[i] = Type::to_float(s[i * stride]);
  }
  for (int64_t i = n; i < padded; ++i) target[i] = 0.0f;
}

void load_row(DType dtype, const void* source, int64_t stride, int64_t n, int64_t padded,
              float* target) {
  switch (dtype) {
    case DType::kFloat32: return load_elements<Float32>(source, stride, n, padded, target);
    case DType::kBFloat16: return load_elements<BFloat16>(source, stride, n, padded, target);
    case DType::kFloat16: return load_elements<Float16>(source, stride, n, padded, target);
  }
}

template <typename Type>
DREAM_INLINE void store_elements(const float* source, float factor, void* target, int64_t stride,
                                 int64_t n) {
  auto* t = static_cast<typename Type::Storage*>(target);
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) t[i] = Type::from_float(source[i] * factor);
  } else {
    for (int64_t i = 0; i < n; ++i) t[i * stride] = Type::from_float(source[i] * factor);
  }
}

void store_row(DType dtype, const float* source, float factor, void* target, int64_t stride,
               int64_t n) {
  switch (dtype) {
    case DType::kFloat32: return store_elements<Float32>(source, factor, target, stride, n);
    case DType::kBFloat16: return store_elements<BFloat16>(source, factor, target, stride, n);
    case DType::kFloat16: return store_elements<Float16>(source, factor, target, stride, n);
  }
}

DREAM_INLINE int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Address of element (i0, i1, i2, 0).
DREAM_INLINE char* row_address(const Operand& operand, DType dtype, int64_t i0, int64_t i1,
                               int64_t i2) {
  const int64_t* s = operand.strides;
  return static_cast<char*>(operand.data) +
         (i0 * s[0] + i1 * s[1] + i2 * s[2]) * element_size(dtype);
}

}  // namespace
}  // namespace dream::cpu
