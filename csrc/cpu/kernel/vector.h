// Vectors of the widest kind that the instruction set at hand has, and e^x of them.
//
// Everything in this folder's .h files that is included by kernel.cpp sits in an anonymous
// namespace and calls nothing from the C++ library: a shared inline function compiled for AVX-512
// could otherwise be the copy that the linker keeps for all.
#pragma once

#include <cstdint>

#include "../../float_types.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

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

DREAM_INLINE float sum_of(Vec x) {
  float sum = 0.0f;
  for (int i = 0; i < kWidth; ++i) sum += x[i];
  return sum;
}

// e^x for x up to 88, to 1 ulp; 0 below -88, and NaN for NaN.
DREAM_INLINE Vec exp(Vec x) {
  x = x < splat(-88.0f) ? splat(-88.0f) : x;
  // Adding 1.5 * 2^23 rounds to an integer n, which is then in the low bits.
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

// tanh(x) to 2 ulp and its derivative 1 - tanh(x)^2, however small, to 5; NaN for NaN.
struct Tanh {
  Vec value;
  Vec slope;
};

DREAM_INLINE Tanh tanh(Vec x) {
  const Vec size = x < Vec{} ? -x : x;
  const Vec e = exp(-2.0f * size);
  const Vec inverse = 1.0f / (1.0f + e);
  const Vec large = (1.0f - e) * inverse;
  // Near 0 the difference would cancel: minimax for (tanh(x) - x) / x^3 over |x| <= 0.55.
  const Vec square = x * x;
  Vec p = splat(-6.27423916e-3f);
  p = p * square + 2.10716780e-2f;
  p = p * square - 5.38523085e-2f;
  p = p * square + 1.33325860e-1f;
  p = p * square - 3.33333164e-1f;
  const Vec small = p * (square * x) + x;
  const Vec value = x < Vec{} ? -large : large;
  return {size <= splat(0.55f) ? small : value, 4.0f * e * (inverse * inverse)};
}

// Natural logarithm of a normal positive number, to 1 ulp; NaN for NaN.
DREAM_INLINE Vec log(Vec x) {
  // x = 2^n (1 + r) with 1 + r between sqrt(1/2) and sqrt(2).
  VecInt bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const VecInt exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent << 23;
  Vec r;
  __builtin_memcpy(&r, &bits, sizeof(r));
  r -= 1.0f;
  const Vec n = __builtin_convertvector(exponent, Vec);
  // Minimax for (log(1 + r) - r + r^2 / 2) / r^3.
  Vec p = splat(-0.0763435736f);
  p = p * r + 0.127615318f;
  p = p * r - 0.131602138f;
  p = p * r + 0.142017663f;
  p = p * r - 0.166233554f;
  p = p * r + 0.200012267f;
  p = p * r - 0.250008225f;
  p = p * r + 0.333333313f;
  const Vec square = r * r;
  p = p * (square * r) + n * -2.12194440e-4f - 0.5f * square;
  return r + p + n * 0.693359375f + (x - x);
}

DREAM_INLINE Vec multiply_add(float a, Vec b, Vec sum) { return sum + splat(a) * b; }

#if defined(__AVX512BF16__)
// Two bfloat16 numbers in 32 bits, the first in the low half.
typedef int32_t Pair;
typedef VecInt PairVec;

// Adds both products, exact, to a float32 sum. Subnormal numbers count as 0.
DREAM_INLINE Vec multiply_add(Pair a, PairVec b, Vec sum) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}

// Rounds to bfloat16 and pairs element with element.
DREAM_INLINE PairVec make_pairs(Vec first, Vec second) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const __m512i order = _mm512_set_epi32(
      0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008,
      0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  return (PairVec)_mm512_permutexvar_epi16(order, halves);
}

// Rounds to bfloat16 and pairs neighbours.
DREAM_INLINE PairVec make_neighbour_pairs(Vec first, Vec second) {
  return (PairVec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

DREAM_INLINE void store(Pair* p, PairVec v) { __builtin_memcpy(p, &v, sizeof(v)); }
#endif

}  // namespace
}  // namespace dream::cpu
