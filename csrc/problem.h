// One call of the operator as plain data: what every native implementation receives.
//
// Nothing here knows about torch. Memory belongs to the caller, strides are counted in elements and
// may be anything, including 0 for an expanded dimension.
#pragma once

#include <cstdint>

namespace dream {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

enum class Mode : int32_t { kReweight, kBias };

// A tensor of up to four dimensions. `data` is null when the tensor is absent.
struct Operand {
  void* data;
  int64_t shape[4];
  int64_t strides[4];
};

// Keys are in two segments of memory that are never joined: the prefix (P keys, possibly shared
// by the whole batch through a batch stride of 0) and the local keys (N). Positions count over
// both, T = P + N.
struct Problem {
  int64_t batch;          // B
  int64_t query_heads;    // Hq
  int64_t key_heads;      // Hkv, divides Hq
  int64_t rows;           // M
  int64_t head_dim;       // D
  int64_t prefix_length;  // P
  int64_t local_length;   // N
  int64_t documents;      // C

  DType dtype;  // of query, key, value, the prefix, the output and their gradients

  Operand query;         // [B, Hq, M, D]
  Operand key;           // [B, Hkv, N, D]
  Operand value;         // [B, Hkv, N, D]
  Operand prefix_key;    // [1 or B, Hkv, P, D]
  Operand prefix_value;  // [1 or B, Hkv, P, D]
  Operand scores;        // [B, 1 or Hq, C] float32
  Operand spans;         // [B, C, 2] int64; start == end marks an absent document
  Operand mask;          // [B, T] bool, true for a token; absent when nothing is padding
  Operand positions;     // [B, T] int64, from which the window counts; absent: the keys' places
  Operand sinks;         // [Hq] float32, a logit without a value in the rest; absent: none
  Operand heads;         // [Hq] bool: the heads that receive the scores

  Mode mode;
  bool fixed_mass;      // whether the mass of all documents together is `document_mass`
  float document_mass;
  float scale;
  bool causal;
  int64_t window;  // keys this many positions before a row and more are hidden; 0 hides none
  float softcap;   // c in c tanh(logit / c); 0 caps nothing
};

// Gradients to compute; a null operand was not asked for.
struct Gradients {
  Operand query;
  Operand key;
  Operand value;
  Operand scores;        // [B, 1 or Hq, C] float32
  Operand prefix_key;    // batch 1 when the prefix is shared
  Operand prefix_value;
  Operand sinks;         // [Hq] float32
};

}  // namespace dream
