// Backward over keys: dK and dV of the keys whose gradients were asked for.
//
// A block has one tile of the plan, a document's or the rest's, and walks over the rows of its key
// head. In every row the gradient of a logit is e^(a - n) (f g + u), with n, f and u of the row and
// the tile's segment, which each step begins by finding.
#pragma once

#include "walk.h"

namespace dream::cuda {

template <typename T, int D, bool BIAS>
struct KeyGradients {
  static constexpr int N = kTileKeys<D>;
  static constexpr int kWarps = N / 16;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int M = kTileRows;
  static constexpr int kKeyTile = N * kRowBytes<D>;
  static constexpr int kRowTile = M * kRowBytes<D>;
  static constexpr int kNumbers = 4 * M * 4;
  static constexpr int kStage = 2 * kRowTile + kNumbers;
  static constexpr int kShared = 2 * kKeyTile + 2 * kStage;
  using Sums = float[D / 8][4];

  const Parameters& p;
  int b;
  int key_head;
  Counts counts;
  Tile tile;
  int positions[2];  // of this thread's two keys, -1 for none
  int first_position;
  Sums of_key, of_value;

  static DREAM_DEVICE Shared queries(int stage) {
    return shared_address(shared_memory()) + 2 * kKeyTile + stage * kStage;
  }
  static DREAM_DEVICE Shared grads(int stage) { return queries(stage) + kRowTile; }
  static DREAM_DEVICE float* numbers(int stage, int which) {
    char* stages = shared_memory() + 2 * kKeyTile;
    return reinterpret_cast<float*>(stages + stage * kStage + 2 * kRowTile) + which * M;
  }
  static DREAM_DEVICE int32_t* limits(int stage) {
    return reinterpret_cast<int32_t*>(numbers(stage, 3));
  }

  // The first tile of rows from `i` on that sees a key of the tile.
  DREAM_DEVICE int next(int i) const {
    while (i * M < row_count(p) && largest_limit(p, i * M, (i + 1) * M) < first_position) ++i;
    return i;
  }

  DREAM_DEVICE void copy(int i, int stage) const {
    copy_rows<D, M, kThreads, true>(p, b, key_head, i * M, queries(stage), grads(stage));
    commit_copies();
    for (int at = thread_index(); at < M; at += kThreads) find_numbers(i, stage, at);
  }

  // n, f and u of a row, and the last position that it sees.
  DREAM_DEVICE void find_numbers(int i, int stage, int at) const {
    const Row row = row_of(p, key_head, i * M + at, counts.first_scored);
    float n = kInf, f = 0.0f, u = 0.0f;
    if (row.valid) {
      const int64_t index = slot_index(p, b, row, 1, 0);
      const float delta = load(p.numbers.delta + index), all = load(p.numbers.norm + index);
      n = all;
      f = 1.0f;
      u = -delta;
      if (row.scored && tile.document == p.documents) {
        n = load(p.numbers.rest_norm + index);
        f = load(p.numbers.rest_factor + index);
        u = load(p.numbers.rest_offset + index);
      } else if (row.scored && BIAS) {
        n -= log2_score(p, b, row, tile.document);
      } else if (row.scored) {
        n = load(state_of(p, b, row, tile.document));
        f = load(p.numbers.mass + index) * load(p.weights + score_index(p, b, row, tile.document));
        const float mean = load(p.means + slot_index(p, b, row, p.documents, tile.document));
        u = -f * (mean + delta);
        if (!p.fixed_mass && all > -kInf) u += exp2(n - all) * load(p.numbers.mean + index);
      }
      if (n == -kInf) n = kInf;
    }
    numbers(stage, 0)[at] = n;
    numbers(stage, 1)[at] = f;
    numbers(stage, 2)[at] = u;
    limits(stage)[at] = row.limit;
  }

  DREAM_DEVICE void visit(int stage, Shared key, Shared value) {
    float s[M / 8][4], g[M / 8][4];
    constexpr int kGroups = M / 16;
    multiply_rows<T, D, M>(s, key, queries(stage), kGroups);
    multiply_rows<T, D, M>(g, value, grads(stage), kGroups);
    DREAM_UNROLL for (int j = 0; j < M / 8; ++j) {
      DREAM_UNROLL for (int e = 0; e < 4; ++e) {
        const int row = fragment_column(j, e);
        const float norm = numbers(stage, 0)[row], factor = numbers(stage, 1)[row];
        const bool hidden = positions[e / 2] > limits(stage)[row];
        const float exponential = exp2(s[j][e] * p.log2_scale - norm);
        const float x = hidden ? 0.0f : exponential;
        s[j][e] = x * factor;
        g[j][e] = x * (factor * g[j][e] + numbers(stage, 2)[row]);
      }
    }
    add_product<T, D, M>(of_value, s, grads(stage), kGroups);
    add_product<T, D, M>(of_key, g, queries(stage), kGroups);
  }

  DREAM_DEVICE void store_sums(const Rows& local, const Rows& prefix, const Sums& x, int half,
                               float factor) const {
    const int position = positions[half];
    if (position >= p.prefix) {
      if (local.data == nullptr) return;
      auto* target = row_address<uint16_t>(local, b, key_head, position - p.prefix);
      store_row<T, D>(target, x, half, factor);
    } else if (prefix.data != nullptr && !p.shared_prefix) {
      store_row<T, D>(row_address<uint16_t>(prefix, b, key_head, position), x, half, factor);
    } else if (prefix.data != nullptr) {
      // Launches for the elements of the batch follow each other.
      auto* target = row_address<float>(prefix, 0, key_head, position);
      DREAM_UNROLL for (int n = 0; n < D / 8; ++n) {
        DREAM_UNROLL for (int i = 0; i < 2; ++i) {
          float* at = target + fragment_column(n, i);
          store(at, load(at) + x[n][2 * half + i] * factor);
        }
      }
    }
  }

  DREAM_DEVICE bool wanted(const Rows& local, const Rows& prefix, int first, int last) const {
    return (local.data != nullptr && last >= p.prefix) || (prefix.data != nullptr && first < p.prefix);
  }

  static DREAM_DEVICE void run(const Parameters& p) {
    const int b = p.first_batch + block_z();
    KeyGradients k{p, b, block_y(), load(p.counts + b), {}, {-1, -1}, 0, {}, {}};
    int i = block_x();
    if (i < p.tile_limit) {
      if (i >= k.counts.document_tiles) return;
      k.tile = load(p.tiles + b * p.tile_limit + i);
    } else {
      const int first = (i - p.tile_limit) * N, left = k.counts.rest_keys - first;
      if (left <= 0) return;
      k.tile = Tile{p.length + first, left < N ? left : N, p.documents, 0};
    }
    const int32_t* list = p.keys + b * 3 * static_cast<int64_t>(p.length) + k.tile.first;
    k.first_position = load(list);
    const int last_position = load(list + k.tile.count - 1);
    if (!k.wanted(p.grad_key, p.grad_prefix_key, k.first_position, last_position) &&
        !k.wanted(p.grad_value, p.grad_prefix_value, k.first_position, last_position)) {
      return;
    }
    const Shared keys = shared_address(shared_memory()), values = keys + kKeyTile;
    copy_keys<D, N, kThreads, true>(p, b, k.key_head, list, k.tile.count, keys, values,
                                    [](int, int) {});
    const int offset = warp_index() * 16, own = offset + lane_index() / 4;
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      const int row = own + 8 * half;
      k.positions[half] = row < k.tile.count ? load(list + row) : -1;
    }
    k.walk(keys + offset * kRowBytes<D>, values + offset * kRowBytes<D>);
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      if (k.positions[half] < 0) continue;
      k.store_sums(p.grad_key, p.grad_prefix_key, k.of_key, half, p.scale);
      k.store_sums(p.grad_value, p.grad_prefix_value, k.of_value, half, 1.0f);
    }
  }

  DREAM_DEVICE void walk(Shared key, Shared value) {
    clear(of_key);
    clear(of_value);
    int i = next(0), stage = 0;
    if (i * M < row_count(p)) copy(i, stage);
    DREAM_ONCE while (i * M < row_count(p)) {
      const int after = next(i + 1);
      wait_copies<0>();
      sync_threads();  // these rows are here for all, and those before were read by all
      if (after * M < row_count(p)) copy(after, 1 - stage);
      visit(stage, key, value);
      i = after;
      stage = 1 - stage;
    }
  }
};

}  // namespace dream::cuda
