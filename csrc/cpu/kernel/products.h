// The matrix products of attention over one key block, in the two number formats.
//
// FloatProducts converts every operand to float32. PairProducts, for bfloat16 where the machine has
// dot products for it, leaves them as they are and sums in float32; probabilities and logit
// gradients are rounded to bfloat16 on their way into a product, as in FlashAttention.
//
// Both offer
//   load_columns: the rows of a [B, Hq, M, D] tensor as the columns of [Dp, lanes];
//   load_rows: the same rows as [count, Dp];
//   dot: out [padded, lanes] = factor * key . column for every key of the block;
//   add: sums [Dp, lanes] += sum over keys of coefficient [count, lanes] * key;
//   outer: out [padded, Dp] = sum over lanes of coefficient [padded, lanes] * row.
#pragma once

#include "blocks.h"
#include "convert.h"
#include "gemm.h"
#include "transpose.h"

namespace dream::cpu {
namespace {

DREAM_INLINE char* row_of(const RowBlock& rows, int r, const Operand& tensor, DType dtype) {
  return row_address(tensor, dtype, rows.batch[r], rows.head[r], rows.row[r]);
}

// Where a key is, in one of two segments of memory.
struct KeySource {
  const Problem& problem;
  const Operand& prefix;
  const Operand& local;

  static KeySource keys(const Problem& p) { return {p, p.prefix_key, p.key}; }
  static KeySource values(const Problem& p) { return {p, p.prefix_value, p.value}; }

  bool in_prefix(int64_t position) const { return position < problem.prefix_length; }
  const Operand& operand(int64_t position) const { return in_prefix(position) ? prefix : local; }

  const char* address(const RowBlock& rows, const KeyBlock& block, int i) const {
    const int64_t position = block.position[i];
    const Operand& source = operand(position);
    // A prefix that all see has a batch stride of 0.
    const int64_t batch = block.batch == kEveryBatch ? 0 : block.batch;
    return row_address(source, problem.dtype, batch, rows.key_head,
                       in_prefix(position) ? position : position - problem.prefix_length);
  }
};

// A matrix of keys: in place or in scratch.
template <typename Element>
struct KeyMatrix {
  const Element* data;
  int64_t stride;
};

// The block's keys in place as rows of elements, `width` numbers each: possible where they lie one
// after the other, aligned, and without need of padding. Null otherwise.
template <typename Element>
KeyMatrix<Element> keys_in_place(const KeySource& source, const RowBlock& rows,
                                 const KeyBlock& block, int64_t width) {
  const Problem& problem = source.problem;
  const int64_t first = block.position[0], last = block.position[block.count - 1];
  const int64_t* strides = source.operand(first).strides;
  const char* address = source.address(rows, block, 0);
  if (problem.head_dim == padded_head_dim(problem) && strides[3] == 1 && strides[2] % width == 0 &&
      reinterpret_cast<uintptr_t>(address) % sizeof(Element) == 0 &&
      block.count == block.padded && block.neighbours &&
      source.in_prefix(first) == source.in_prefix(last)) {
    return {reinterpret_cast<const Element*>(address), strides[2] / width};
  }
  return {nullptr, 0};
}

struct FloatProducts {
  static void load_columns(const Problem& problem, const RowBlock& rows, const Operand& tensor,
                           Workspace& w, float* columns) {
    const int64_t dim = padded_head_dim(problem);
    load_rows(problem, rows, tensor, w.key_block);
    rows_to_lanes([&](int r) { return w.key_block + r * dim; }, rows.count, dim, 0.0f, columns,
                  rows.lanes);
  }

  static void load_rows(const Problem& problem, const RowBlock& rows, const Operand& tensor,
                        float* by_row) {
    const int64_t dim = padded_head_dim(problem);
    for (int r = 0; r < rows.count; ++r) {
      load_row(problem.dtype, row_of(rows, r, tensor, problem.dtype), tensor.strides[3],
               problem.head_dim, dim, by_row + r * dim);
    }
  }

  static void dot(const KeySource& source, const RowBlock& rows, const KeyBlock& block,
                  const float* columns, float factor, Workspace& w, float* out) {
    const KeyMatrix<float> keys = load_keys(source, rows, block, w);
    multiply<Lies::kByRows>(block.padded, rows.lanes, source.problem.head_dim, keys.data,
                            keys.stride, columns, rows.lanes, out, rows.lanes, false, factor);
  }

  static void add(const KeySource& source, const RowBlock& rows, const KeyBlock& block,
                  const float* coefficients, Workspace& w, float* sums, bool accumulate) {
    const KeyMatrix<float> keys = load_keys(source, rows, block, w);
    multiply<Lies::kByColumns>(padded_head_dim(source.problem), rows.lanes, block.count, keys.data,
                               keys.stride, coefficients, rows.lanes, sums, rows.lanes, accumulate);
  }

  static void outer(const RowBlock& rows, const KeyBlock& block, const float* coefficients,
                    const float* by_row, int64_t dim, Workspace&, float* out) {
    multiply<Lies::kByRows>(block.padded, dim, rows.count, coefficients, rows.lanes, by_row, dim,
                            out, dim, false);
  }

 private:
  // [padded, Dp]
  static KeyMatrix<float> load_keys(const KeySource& source, const RowBlock& rows,
                                    const KeyBlock& block, Workspace& w) {
    const Problem& problem = source.problem;
    const int64_t dim = padded_head_dim(problem);
    if (problem.dtype == DType::kFloat32) {
      const KeyMatrix<float> keys = keys_in_place<float>(source, rows, block, 1);
      if (keys.data != nullptr) return keys;
    }
    for (int i = 0; i < block.count; ++i) {
      load_row(problem.dtype, source.address(rows, block, i),
               source.operand(block.position[i]).strides[3], problem.head_dim, dim,
               w.key_block + i * dim);
    }
    fill(w.key_block + block.count * dim, (block.padded - block.count) * dim, 0.0f);
    return {w.key_block, dim};
  }
};

#if defined(__AVX512BF16__)
struct PairProducts {
  // Pairs lie along D.
  static void load_columns(const Problem& problem, const RowBlock& rows, const Operand& tensor,
                           Workspace& w, float* columns) {
    const int64_t pairs = padded_head_dim(problem) / 2;
    auto* by_row = reinterpret_cast<Pair*>(w.key_block);
    for (int r = 0; r < rows.count; ++r) {
      copy_row(problem, row_of(rows, r, tensor, problem.dtype), tensor.strides[3],
               by_row + r * pairs);
    }
    // A pair moves like a float.
    rows_to_lanes([&](int r) { return w.key_block + r * pairs; }, rows.count, pairs, 0.0f, columns,
                  rows.lanes);
  }

  // Pairs lie along the rows: [(count + 1) / 2, Dp].
  static void load_rows(const Problem& problem, const RowBlock& rows, const Operand& tensor,
                        float* by_row) {
    const int64_t dim = padded_head_dim(problem);
    for (int r = 0; r < rows.count; r += 2) {
      const char* first = row_of(rows, r, tensor, problem.dtype);
      const char* second =
          r + 1 < rows.count ? row_of(rows, r + 1, tensor, problem.dtype) : nullptr;
      pair_rows(problem, first, tensor.strides[3], second, tensor.strides[3],
                reinterpret_cast<Pair*>(by_row) + r / 2 * dim);
    }
  }

  static void dot(const KeySource& source, const RowBlock& rows, const KeyBlock& block,
                  const float* columns, float factor, Workspace& w, float* out) {
    const int64_t lanes = rows.lanes;
    const KeyMatrix<Pair> keys = load_keys(source, rows, block, w);
    multiply<Lies::kByRows>(block.padded, lanes, (source.problem.head_dim + 1) / 2, keys.data,
                            keys.stride, reinterpret_cast<const Pair*>(columns), lanes, out, lanes,
                            false, factor);
  }

  static void add(const KeySource& source, const RowBlock& rows, const KeyBlock& block,
                  const float* coefficients, Workspace& w, float* sums, bool accumulate) {
    const Problem& problem = source.problem;
    const int64_t dim = padded_head_dim(problem), lanes = rows.lanes;
    auto* keys = reinterpret_cast<Pair*>(w.key_block);
    auto* pairs = reinterpret_cast<Pair*>(w.pairs);
    for (int i = 0; i < block.count; i += 2) {
      const bool paired = i + 1 < block.count;
      const float* row = coefficients + i * lanes;
      for (int64_t v = 0; v < lanes; v += kWidth) {
        store(pairs + i / 2 * lanes + v,
              make_pairs(load(row + v), paired ? load(row + lanes + v) : Vec{}));
      }
      pair_rows(problem, source.address(rows, block, i),
                source.operand(block.position[i]).strides[3],
                paired ? source.address(rows, block, i + 1) : nullptr,
                paired ? source.operand(block.position[i + 1]).strides[3] : 0,
                keys + i / 2 * dim);
    }
    multiply<Lies::kByColumns>(dim, lanes, (block.count + 1) / 2, static_cast<const Pair*>(keys),
                               dim, static_cast<const Pair*>(pairs), lanes, sums, lanes,
                               accumulate);
  }

  static void outer(const RowBlock& rows, const KeyBlock& block, const float* coefficients,
                    const float* by_row, int64_t dim, Workspace& w, float* out) {
    // The rows of coefficients lie end to end and are an even number, so that no vector is alone.
    auto* pairs = reinterpret_cast<Pair*>(w.pairs);
    const int64_t n = block.padded * rows.lanes;
    for (int64_t i = 0; i < n; i += 2 * kWidth) {
      store(pairs + i / 2, make_neighbour_pairs(load(coefficients + i),
                                                load(coefficients + i + kWidth)));
    }
    multiply<Lies::kByRows>(block.padded, dim, (rows.count + 1) / 2,
                            static_cast<const Pair*>(pairs), rows.lanes / 2,
                            reinterpret_cast<const Pair*>(by_row), dim, out, dim, false);
  }

 private:
  using Half = uint16_t;

  // [padded, Dp / 2], pairs along D
  static KeyMatrix<Pair> load_keys(const KeySource& source, const RowBlock& rows,
                                   const KeyBlock& block, Workspace& w) {
    const KeyMatrix<Pair> in_place = keys_in_place<Pair>(source, rows, block, 2);
    if (in_place.data != nullptr) return in_place;
    const Problem& problem = source.problem;
    const int64_t pairs = padded_head_dim(problem) / 2;
    auto* keys = reinterpret_cast<Pair*>(w.key_block);
    for (int i = 0; i < block.count; ++i) {
      copy_row(problem, source.address(rows, block, i),
               source.operand(block.position[i]).strides[3], keys + i * pairs);
    }
    fill(w.key_block + block.count * pairs, (block.padded - block.count) * pairs, 0.0f);
    return {keys, pairs};
  }

  static DREAM_INLINE void copy_row(const Problem& problem, const void* source, int64_t stride,
                                    Pair* target) {
    const auto* s = static_cast<const Half*>(source);
    const int64_t n = problem.head_dim, dim = padded_head_dim(problem);
    auto* t = reinterpret_cast<char*>(target);
    if (stride == 1) {
      __builtin_memcpy(t, s, n * sizeof(Half));
    } else {
      for (int64_t i = 0; i < n; ++i) {
        __builtin_memcpy(t + i * sizeof(Half), s + i * stride, sizeof(Half));
      }
    }
    __builtin_memset(t + n * sizeof(Half), 0, (dim - n) * sizeof(Half));
  }

  // target[d] = (first[d], second[d]), zeros where there is no second.
  static DREAM_INLINE void pair_rows(const Problem& problem, const void* first,
                                     int64_t first_stride, const void* second,
                                     int64_t second_stride, Pair* target) {
    const auto* a = static_cast<const Half*>(first);
    const auto* b = static_cast<const Half*>(second);
    const int64_t n = problem.head_dim, dim = padded_head_dim(problem);
    if (b == nullptr) {
      for (int64_t d = 0; d < n; ++d) target[d] = a[d * first_stride];
    } else if (first_stride == 1 && second_stride == 1) {
      for (int64_t d = 0; d < n; ++d) target[d] = static_cast<Pair>(a[d] | uint32_t{b[d]} << 16);
    } else {
      for (int64_t d = 0; d < n; ++d) {
        target[d] =
            static_cast<Pair>(a[d * first_stride] | uint32_t{b[d * second_stride]} << 16);
      }
    }
    for (int64_t d = n; d < dim; ++d) target[d] = 0;
  }
};
#endif

// Writes the lanes of `by_column` times `factor` to the rows of `tensor`.
void store_rows(const Problem& problem, const RowBlock& rows, const float* by_column, float factor,
                Workspace& w, const Operand& tensor) {
  const int64_t dim = padded_head_dim(problem);
  lanes_to_rows(by_column, rows.lanes, rows.count, dim,
                [&](int r) { return w.key_block + r * dim; });
  for (int r = 0; r < rows.count; ++r) {
    store_row(problem.dtype, w.key_block + r * dim, factor, row_of(rows, r, tensor, problem.dtype),
              tensor.strides[3], problem.head_dim);
  }
}

// Turns `n` logits a into c tanh(a / c), and writes the derivatives unless `slopes` is null.
__attribute__((noinline)) void cap_logits(float c, int64_t n, float* logits, float* slopes) {
  const float inverse = 1.0f / c;
  for (int64_t i = 0; i < n; i += kWidth) {
    const Tanh capped = tanh(load(logits + i) * inverse);
    store(logits + i, capped.value * c);
    if (slopes != nullptr) store(slopes + i, capped.slope);
  }
}

// Writes -inf where a row does not see a key.
template <bool kWindowed>
__attribute__((noinline)) void mask_logits(const RowBlock& rows, const KeyBlock& block,
                                           float* logits) {
  const int64_t lanes = rows.lanes;
  for (int64_t v = 0; v < lanes; v += kWidth) {
    const VecInt limit = load(rows.limit + v);
    const VecInt batch = block.of_one_batch ? VecInt{} + static_cast<int32_t>(block.batch)
                                            : load(rows.batch + v);
    const VecInt own = load(rows.batch + v) == batch;
    for (int i = 0; i < block.count; ++i) {
      VecInt seen = own & ((VecInt{} + block.position[i]) <= limit);
      if (kWindowed) seen &= (VecInt{} + block.window_position[i]) >= load(rows.reach + v);
      float* x = logits + i * lanes + v;
      store(x, seen != 0 ? load(x) : splat(-kInfinity));
    }
  }
}

// The block's logits [padded, lanes], -inf where a row does not see a key. With a soft cap, `slopes`
// gets its derivatives unless it is null.
template <typename Products>
void compute_logits(const Problem& problem, const RowBlock& rows, const KeyBlock& block,
                    Workspace& w, float* logits, float* slopes = nullptr) {
  Products::dot(KeySource::keys(problem), rows, block, w.query_columns, problem.scale, w, logits);
  if (problem.softcap > 0.0f) {
    cap_logits(problem.softcap, block.count * rows.lanes, logits, slopes);
  }
  if (!block.masked && !block.of_one_batch) return;
  if (rows.windowed) {
    mask_logits<true>(rows, block, logits);
  } else {
    mask_logits<false>(rows, block, logits);
  }
}

}  // namespace
}  // namespace dream::cpu
