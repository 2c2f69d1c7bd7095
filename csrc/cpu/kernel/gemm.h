// The one matrix product of the kernel: C[i, l] = factor * sum over k of A(i, k) * B[k, l], added to
// what C held or not. A product is summed by itself and then added: one running sum over all keys of
// a long prefix would round as often as there are keys. So would one over a large head, which is
// summed in parts.
//
// B and C have their vectors along l; A is read one element at a time and spread over a vector, so
// keys, values and probabilities are used as they lie, without a transposed copy. An element is a
// float, or a pair of bfloat16 that are neighbours along k.
#pragma once

#include "vector.h"

namespace dream::cpu {
namespace {

// How A lies: A(i, k) at a[i * stride + k], or at a[k * stride + i].
enum class Lies { kByRows, kByColumns };

// Elements of a part of a sum.
constexpr int64_t kPart = 32;

template <int kVectors, Lies kLies, typename Element>
DREAM_INLINE void tile(int64_t inner, const Element* a, int64_t a_stride, const Element* b,
                       int64_t b_stride, float* c, int64_t c_stride, bool accumulate, float factor) {
  Vec sum[kTileRows][kVectors];
  for (int i = 0; i < kTileRows; ++i) {
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Vec{};
  }
  for (int64_t k = 0; k < inner; ++k) {
    decltype(load(b)) row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * b_stride + v * kWidth);
    for (int i = 0; i < kTileRows; ++i) {
      const Element x = kLies == Lies::kByRows ? a[i * a_stride + k] : a[k * a_stride + i];
      for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(x, row[v], sum[i][v]);
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* out = c + i * c_stride + v * kWidth;
      store(out, accumulate ? load(out) + sum[i][v] * factor : sum[i][v] * factor);
    }
  }
}

template <int kVectors, Lies kLies, typename Element>
__attribute__((noinline)) void tile_column(int64_t rows, int64_t inner, const Element* a,
                                           int64_t a_stride, const Element* b, int64_t b_stride,
                                           float* c, int64_t c_stride, bool accumulate,
                                           float factor) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const Element* a_tile = kLies == Lies::kByRows ? a + i * a_stride : a + i;
    bool add = accumulate;
    for (int64_t k = 0; k < inner; k += kPart, add = true) {
      const int64_t length = inner - k < kPart ? inner - k : kPart;
      tile<kVectors, kLies>(length, kLies == Lies::kByRows ? a_tile + k : a_tile + k * a_stride,
                            a_stride, b + k * b_stride, b_stride, c + i * c_stride, c_stride, add,
                            factor);
    }
  }
}

// `rows` is a multiple of 8, `columns` one of kLaneUnit, and `inner` at least 1.
template <Lies kLies, typename Element>
void multiply(int64_t rows, int64_t columns, int64_t inner, const Element* a, int64_t a_stride,
              const Element* b, int64_t b_stride, float* c, int64_t c_stride, bool accumulate,
              float factor = 1.0f) {
  for (int64_t left = columns / kWidth; left > 0;) {
    // Tiles of 3 vectors keep most registers busy; 4 are better split 2 + 2 than 3 + 1.
    const int64_t vectors = left == 2 || left == 4 ? 2 : left == 1 ? 1 : 3;
    const auto column = vectors == 3   ? tile_column<3, kLies, Element>
                        : vectors == 2 ? tile_column<2, kLies, Element>
                                       : tile_column<1, kLies, Element>;
    column(rows, inner, a, a_stride, b, b_stride, c, c_stride, accumulate, factor);
    b += vectors * kWidth;
    c += vectors * kWidth;
    left -= vectors;
  }
}

}  // namespace
}  // namespace dream::cpu
