// Vectors of the widest kind that the instruction set at hand has, and e^x of them.
//
// Everything in this folder's .h files that is included by kernel.cpp sits in an anonymous
// namespace and calls nothing from the C++ library: a shared inline function compiled for AVX-512
// could otherwise be the copy that the linker keeps for all.
#pragma once

#include <cstdint>

namespace dream::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Rows of a tile of the matrix product: 32 vector registers hold 8 x 3 sums, 16 hold 4 x 3.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

constexpr int kWidth = kVectorBytes / sizeof(float);

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecInt __attribute__((vector_size(kVectorBytes)));

#define DREAM_INLINE inline __attribute__((always_inline))

DREAM_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

DREAM_INLINE VecInt load(const int32_t* p) {
  VecInt v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

DREAM_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

// Subtracting 0 changes no value, so the compiler drops it; adding 0 would change -0.
DREAM_INLINE Vec splat(float x) { return x - Vec{}; }

constexpr float kInfinity = __builtin_inff();

DREAM_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// e^x for x up to 88, to 1 ulp; 0 below -88, and NaN for NaN.
DREAM_INLINE Vec exp(Vec x) {
  x = x < splat(-88.0f) ? splat(-88.0f) : x;
  // Adding 1.5 * 2^23 rounds to an integer n, which then stands in the low bits.
  const Vec rounded = x * 1.44269504f + 12582912.0f;
  const Vec n = rounded - 12582912.0f;
  // x - n log 2 in two steps, of which the first is exact.
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  // Minimax for (e^r - 1 - r) / r^2 over |r| <= log(2) / 2, in relative error of e^r.
  Vec p = splat(1.38145371e-3f);
  p = p * r + 8.36874545e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * (r * r) + r + 1.0f;
  VecInt bits;
  __builtin_memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits + 127) << 23;
  Vec power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// Natural logarithms in place; per row and segment only, so the C library's.
DREAM_INLINE void log_in_place(float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = __builtin_logf(values[i]);
}

}  // namespace
}  // namespace dream::cpu
