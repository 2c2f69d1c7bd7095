// Between the caller's tensors and float32 scratch.
#pragma once

#include "../../float_types.h"
#include "vector.h"

namespace dream::cpu {
namespace {

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
