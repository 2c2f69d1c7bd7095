// What the kernels over rows and over keys share: which rows a block has, tiles in shared memory and
// their products.
#pragma once

#include "parameters.h"
#include "simt.h"

namespace dream::cuda {

// Keys of a tile, and rows of a tile in the kernel over keys.
template <int D>
constexpr int kTileKeys = D == 64 ? 64 : 32;
constexpr int kTileRows = 32;

// -- Rows. Those of a key head are in the order of its query heads, scored ones first.

struct Row {
  int head;
  int m;
  int limit;  // last position that it sees, -1 for none
  bool valid;
  bool scored;
};

DREAM_DEVICE int row_count(const Parameters& p) { return p.group * p.rows; }

DREAM_DEVICE int limit_of(const Parameters& p, int m) {
  return p.causal ? p.length - p.rows + m : p.length - 1;
}

DREAM_DEVICE Row row_of(const Parameters& p, int key_head, int r, int first_scored) {
  Row row;
  row.valid = r < row_count(p);
  const int i = row.valid ? r / p.rows : 0;
  row.m = row.valid ? r - i * p.rows : 0;
  row.head = p.order[key_head * p.group + i];
  row.limit = row.valid ? limit_of(p, row.m) : -1;
  row.scored = row.valid && i < p.scored_count[key_head] && row.m >= first_scored;
  return row;
}

// Whether one of the warp's rows, of which each thread has two, is of this kind.
DREAM_DEVICE bool warp_has(const Row (&rows)[2], bool scored) {
  int has = 0;
  DREAM_UNROLL for (int half = 0; half < 2; ++half) {
    has |= rows[half].valid && rows[half].scored == scored;
  }
  for (int mask = 4; mask < kWarp; mask *= 2) has |= shuffle_xor(has, mask);
  return has != 0;
}

// Whether the rows [first, end) of a key head have scored ones, and plain ones.
struct Kinds {
  bool scored, plain;
};

DREAM_DEVICE Kinds kinds_of(const Parameters& p, int key_head, int first, int end,
                            int first_scored) {
  Kinds kinds{false, false};
  end = end < row_count(p) ? end : row_count(p);
  DREAM_ONCE for (int i = first / p.rows; i * p.rows < end; ++i) {
    const int low = first - i * p.rows > 0 ? first - i * p.rows : 0;
    const int high = end - i * p.rows < p.rows ? end - i * p.rows : p.rows;
    const int border = i < p.scored_count[key_head] ? first_scored : p.rows;
    kinds.scored |= high > border;
    kinds.plain |= low < border;
  }
  return kinds;
}

// The largest limit of the rows [first, end) of a key head.
DREAM_DEVICE int largest_limit(const Parameters& p, int first, int end) {
  end = end < row_count(p) ? end : row_count(p);
  const bool one_head = first / p.rows == (end - 1) / p.rows;
  return limit_of(p, one_head ? (end - 1) % p.rows : p.rows - 1);
}

// Index of a row in a tensor [B, Hq, slots, M].
DREAM_DEVICE int64_t slot_index(const Parameters& p, int64_t b, const Row& row, int slots, int slot) {
  return ((b * p.query_heads + opaque(row.head)) * slots + slot) * p.rows + row.m;
}

// Index of a row in a tensor [parts, B, Hq, M].
DREAM_DEVICE int64_t split_index(const Parameters& p, int64_t b, const Row& row, int part) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.query_heads * p.rows;
  return part * rows + slot_index(p, b, row, 1, 0);
}

DREAM_DEVICE float* state_of(const Parameters& p, int64_t b, const Row& row, int slot) {
  return p.state + slot_index(p, b, row, p.slots, slot);
}

// A number for a row and document in a tensor [B, score_heads, C].
DREAM_DEVICE int64_t score_index(const Parameters& p, int64_t b, const Row& row, int d) {
  return (b * p.score_heads + (p.score_heads > 1 ? row.head : 0)) * p.documents + d;
}

DREAM_DEVICE float log2_score(const Parameters& p, int64_t b, const Row& row, int64_t d) {
  const int64_t head = p.score_heads > 1 ? row.head : 0;
  return load(p.scores + b * p.score_strides[0] + head * p.score_strides[1] +
              d * p.score_strides[2]) * kLog2E;
}

template <typename Element>
DREAM_DEVICE Element* row_address(const Rows& rows, int64_t b, int64_t head, int row) {
  return reinterpret_cast<Element*>(rows.data) + b * rows.batch + head * rows.head +
         static_cast<int64_t>(row) * rows.row;
}

// -- Tiles in shared memory: rows of D elements, in chunks of 16 bytes that are exchanged so that
// the eight rows of a matrix lie in different banks.

template <int D>
constexpr int kRowBytes = D * 2;

template <int D>
DREAM_DEVICE Shared chunk(Shared tile, int row, int c) {
  return tile + row * kRowBytes<D> + ((c ^ (row & 7)) << 4);
}

// The chunk that is `c` further, for a place whose own number has none of the bits of c, `rows`
// lower; a multiple of eight rows.
template <int D>
DREAM_DEVICE Shared further(Shared place, int c, int rows) {
  return (place ^ (c << 4)) + rows * kRowBytes<D>;
}

// Calls copy(row, c) for this thread's rows and its chunk c of a tile of ROWS rows.
template <int D, int ROWS, int THREADS, typename Copy>
DREAM_DEVICE void for_rows(Copy copy) {
  constexpr int kChunks = D / 8;
  static_assert(THREADS % kChunks == 0);
  DREAM_UNROLL for (int row = thread_index() / kChunks; row < ROWS; row += THREADS / kChunks) {
    copy(row, thread_index() % kChunks);
  }
}

// Where the keys or values of a head are: in the prefix, and after it.
struct Memory {
  const uint16_t *prefix, *local;
  int32_t prefix_row, local_row;

  static DREAM_DEVICE Memory of(const Rows& prefix, const Rows& local, int64_t b, int head) {
    return {row_address<uint16_t>(prefix, b, head, 0), row_address<uint16_t>(local, b, head, 0),
            prefix.row, local.row};
  }

  DREAM_DEVICE const uint16_t* at(int position, int prefix_length) const {
    const bool first = position < prefix_length;
    const int row = first ? position : position - prefix_length;
    return (first ? prefix : local) + static_cast<int64_t>(row) * (first ? prefix_row : local_row);
  }
};

// Begins to copy a tile of keys, and one of values, from where `list` says; positions(row, position)
// is called once for each row. What is beyond `count` becomes zeros.
template <int D, int ROWS, int THREADS, bool VALUES, typename Positions>
DREAM_DEVICE void copy_keys(const Parameters& p, int64_t b, int key_head, const int32_t* list,
                            int count, Shared keys, Shared values, Positions positions) {
  const Memory of_keys = Memory::of(p.prefix_key, p.key, b, key_head);
  const Memory of_values = Memory::of(p.prefix_value, p.value, b, key_head);
  for_rows<D, ROWS, THREADS>([&](int row, int c) {
    const bool zeros = row >= count;
    const int position = zeros ? 0 : load(list + row);
    copy_async(chunk<D>(keys, row, c), of_keys.at(position, p.prefix) + c * 8, zeros);
    if (VALUES) copy_async(chunk<D>(values, row, c), of_values.at(position, p.prefix) + c * 8, zeros);
    if (c == 0) positions(row, position);
  });
}

// Begins to copy rows of a query and of the output's gradient; the latter with GRADS.
template <int D, int ROWS, int THREADS, bool GRADS>
DREAM_DEVICE void copy_rows(const Parameters& p, int64_t b, int key_head, int first, Shared queries,
                            Shared grads) {
  for_rows<D, ROWS, THREADS>([&](int at, int c) {
    const Row row = row_of(p, key_head, first + at, 0);
    const uint16_t* from = row_address<uint16_t>(p.query, b, row.head, row.m);
    copy_async(chunk<D>(queries, at, c), from + c * 8, !row.valid);
    if (!GRADS) return;
    from = row_address<uint16_t>(p.grad_output, b, row.head, row.m);
    copy_async(chunk<D>(grads, at, c), from + c * 8, !row.valid);
  });
}

// -- Products. `groups` are the sixteens of keys that a tile holds, N / 16 in a full one.

template <int N>
DREAM_DEVICE void clear(float (&x)[N][4]) {
  DREAM_UNROLL for (int n = 0; n < N; ++n) {
    DREAM_UNROLL for (int i = 0; i < 4; ++i) x[n][i] = 0.0f;
  }
}

// s[16, N] = a b^T, both of D elements a row.
template <typename T, int D, int N>
DREAM_DEVICE void multiply_rows(float (&s)[N / 8][4], Shared a, Shared b, int groups) {
  const int lane = lane_index();
  a = chunk<D>(a, lane & 15, lane >> 4);
  b = chunk<D>(b, lane & 7, lane >> 3);
  clear(s);
  const auto step = [&](int k, int n, const uint32_t (&a0)[4], const uint32_t (&a1)[4]) {
    uint32_t r[4];
    load_matrices<false>(r, further<D>(b, k * 4, n * 8));
    multiply<T>(s[n], a0, r[0], r[1]);
    multiply<T>(s[n], a1, r[2], r[3]);
  };
  DREAM_UNROLL for (int k = 0; k < D / 32; ++k) {
    uint32_t a0[4], a1[4];
    load_matrices<false>(a0, further<D>(a, k * 4, 0));
    load_matrices<false>(a1, further<D>(a, k * 4 + 2, 0));
    if (N <= 32 || groups == N / 16) {
      DREAM_UNROLL for (int n = 0; n < N / 8; ++n) step(k, n, a0, a1);
    } else {
      DREAM_UNROLL for (int n = 0; n < N / 8; ++n) {
        if (n / 2 < groups) step(k, n, a0, a1);
      }
    }
  }
}

// o[16, D] += a[16, N] b, where b has N rows of D elements and `a` is rounded from x.
template <typename T, int D, int N>
DREAM_DEVICE void add_product(float (&o)[D / 8][4], const float (&x)[N / 8][4], Shared b,
                              int groups) {
  b = chunk<D>(b, lane_index() & 15, lane_index() >> 4);
  const auto step = [&](int j) {
    const uint32_t a[4] = {pack<T>(x[2 * j][0], x[2 * j][1]), pack<T>(x[2 * j][2], x[2 * j][3]),
                           pack<T>(x[2 * j + 1][0], x[2 * j + 1][1]),
                           pack<T>(x[2 * j + 1][2], x[2 * j + 1][3])};
    DREAM_UNROLL for (int c = 0; c < D / 8; c += 2) {
      uint32_t r[4];
      load_matrices<true>(r, further<D>(b, c, j * 16));
      multiply<T>(o[c], a, r[0], r[1]);
      multiply<T>(o[c + 1], a, r[2], r[3]);
    }
  };
  if (N <= 32 || groups == N / 16) {
    DREAM_UNROLL for (int j = 0; j < N / 16; ++j) step(j);
  } else {
    DREAM_UNROLL for (int j = 0; j < N / 16; ++j) {
      if (j < groups) step(j);
    }
  }
}

// The row of a fragment's element i, and its column in its group of eight.
DREAM_DEVICE int fragment_column(int n, int i) { return n * 8 + lane_index() % 4 * 2 + (i & 1); }

// Writes the two rows of a fragment as elements of T.
template <typename T, int D>
DREAM_DEVICE void store_row(uint16_t* target, const float (&x)[D / 8][4], int half, float factor) {
  DREAM_UNROLL for (int n = 0; n < D / 8; ++n) {
    store(reinterpret_cast<uint32_t*>(target + fragment_column(n, 0)),
          pack<T>(x[n][2 * half] * factor, x[n][2 * half + 1] * factor));
  }
}

}  // namespace dream::cuda
