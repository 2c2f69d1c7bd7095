// What every kernel receives: one call as plain data, with the memory that the kernels share.
#pragma once

#include <cstdint>

namespace dream::cuda {

constexpr int kMaxHeads = 256;

// A tensor [B, H, rows, D] whose last stride is 1; the others are in elements.
struct Rows {
  char* data;
  int64_t batch;
  int64_t head;
  int32_t row;
};

// Keys of one document that are multiplied together: `count` entries of the list of keys from
// `first` on. The first tile of a document has kOpens, the last one kCloses.
struct Tile {
  int32_t first;
  int32_t count;
  int32_t document;
  int32_t ends;
};
constexpr int kOpens = 1;
constexpr int kCloses = 2;

// What the plan found in one batch element.
struct Counts {
  int32_t document_tiles;
  int32_t document_keys;
  int32_t rest_keys;
  int32_t first_scored;  // rows from here on are scored in the heads that receive scores
};

// One number per row: [B, Hq, M].
struct RowNumbers {
  float* norm;         // log-sum-exp of all that the row sees
  float* rest_norm;    // of the rest, or of all where the rest's gradient goes through all
  float* rest_factor;
  float* rest_offset;
  float* mass;         // of all documents together, 0 for a plain row
  float* mean;         // sum of w_d times the mean of g in d, less delta
  float* delta;        // dO . o
};

// Logarithms are of base 2.
struct Parameters {
  int32_t batch, query_heads, key_heads, group, rows, head_dim;
  int32_t prefix, length, documents, score_heads;
  int32_t slots;       // of the state
  int32_t tile_keys;   // most keys of a tile
  int32_t tile_limit;  // most tiles of a batch element's documents
  int32_t first_batch;  // of the launch, and
  int32_t splits;       // parts that a row block's keys are cut into
  int32_t causal, fixed_mass, shared_prefix;
  float document_mass;
  float scale;       // of q . k in the output's gradient
  float log2_scale;  // scale / log 2

  Rows query, key, value, prefix_key, prefix_value, output, grad_output;
  Rows grad_query, grad_key, grad_value;
  Rows grad_prefix_key, grad_prefix_value;  // sums in float32 [Hkv, P, D] where it is shared

  const float* scores;  // [B, score_heads, C]
  int64_t score_strides[3];
  const int64_t* spans;  // [B, C, 2]
  const uint8_t* mask;   // [B, T] or null
  float* grad_scores;    // [B, score_heads, C]

  // The plan.
  int32_t* before;   // [B, T + 1]: document keys before a position
  int32_t* keys;     // [B, 3, T]: positions of document keys, of the rest, of all; no padding
  Tile* tiles;       // [B, tile_limit]
  Counts* counts;    // [B]
  float* weights;    // [B, score_heads, C]: softmax of the scores

  // [B, Hq, slots, M]. Reweight: log-sum-exp of each document, of the rest, of all documents (scored
  // rows), of all keys. Bias: of all keys, scores included.
  float* state;
  // What splits leave to be joined: [splits, 3, B, Hq, M, D + 2], [splits, B, Hq, M, 2 D + 2] in
  // the backward.
  float* partial;
  // [B, Hq, C, M], scored rows. Reweight: mean of g in each document less delta. Bias: the sum of
  // the logits' gradients in it.
  float* means;
  RowNumbers numbers;

  int16_t order[kMaxHeads];   // the query heads of each key head, scored ones first
  uint8_t scored[kMaxHeads];  // whether a query head receives the scores
  int16_t scored_count[kMaxHeads];  // scored heads of each key head
};

static_assert(sizeof(Parameters) <= 4096, "kernels take at most 4 KB of arguments");

}  // namespace dream::cuda
