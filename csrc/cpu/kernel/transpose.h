// Transposes between rows in memory and lanes in vectors.
#pragma once

#include "vector.h"

namespace dream::cpu {
namespace {

#if defined(__AVX512F__)
#define DREAM_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define DREAM_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define DREAM_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define DREAM_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define DREAM_LOW 0, 4, 1, 5
#define DREAM_HIGH 2, 6, 3, 7
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define DREAM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DREAM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecInt{__VA_ARGS__})
#endif

// Each round deals the two halves of the vectors together like cards; after log2(kWidth) rounds
// element j of vector i is element i of vector j.
DREAM_INLINE void transpose_square(Vec* x) {
  for (int round = 1; round < kWidth; round *= 2) {
    Vec dealt[kWidth];
    for (int i = 0; i < kWidth / 2; ++i) {
      dealt[2 * i] = DREAM_SHUFFLE(x[i], x[i + kWidth / 2], DREAM_LOW);
      dealt[2 * i + 1] = DREAM_SHUFFLE(x[i], x[i + kWidth / 2], DREAM_HIGH);
    }
    for (int i = 0; i < kWidth; ++i) x[i] = dealt[i];
  }
}

#undef DREAM_LOW
#undef DREAM_HIGH
#undef DREAM_SHUFFLE

// target[c, r] = row(r)[c] for r < count and c < columns, in [columns, lanes]; lanes of no row get
// `rest`. The next columns of a row are asked for ahead.
template <typename Row>
DREAM_INLINE void rows_to_lanes(const Row& row, int count, int64_t columns, float rest,
                                float* target, int lanes) {
  for (int first = 0; first < lanes; first += kWidth) {
    int64_t c = 0;
    for (; c + kWidth <= columns; c += kWidth) {
      Vec x[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        x[i] = splat(rest);
        if (first + i >= count) continue;
        x[i] = load(row(first + i) + c);
        __builtin_prefetch(row(first + i) + c + 2 * kWidth);
      }
      transpose_square(x);
      for (int i = 0; i < kWidth; ++i) store(target + (c + i) * lanes + first, x[i]);
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < kWidth; ++i) {
        target[c * lanes + first + i] = first + i < count ? row(first + i)[c] : rest;
      }
    }
  }
}

// row(r)[c] = source[c, r] for r < count and c < columns, from [columns, lanes].
template <typename Row>
DREAM_INLINE void lanes_to_rows(const float* source, int lanes, int count, int64_t columns,
                                const Row& row) {
  for (int first = 0; first < count; first += kWidth) {
    const int rows = count - first < kWidth ? count - first : kWidth;
    int64_t c = 0;
    for (; c + kWidth <= columns; c += kWidth) {
      Vec x[kWidth];
      for (int i = 0; i < kWidth; ++i) x[i] = load(source + (c + i) * lanes + first);
      transpose_square(x);
      for (int i = 0; i < rows; ++i) store(row(first + i) + c, x[i]);
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < rows; ++i) row(first + i)[c] = source[c * lanes + first + i];
    }
  }
}

}  // namespace
}  // namespace dream::cpu
