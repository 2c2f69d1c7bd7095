// Backward over rows: the mean of g = dO . v in each document, which the scores' gradient is made of,
// and the query's gradient, in one pass.
//
// With p = softmax in a document, m its mass and c the mean of g in it so far, a document's tiles add
// up A = sum p (g - c) k and B = sum p k. As c moves to c', A becomes A + (c - c') B. It closes with
//
//   dQ += f A,   E += m B,   and at last   dQ += (mean of all documents - delta) E.
//
// What is rounded is thus of the size of the logits' gradients themselves, in a document whose mass
// is at one of its keys, too. dQ and E are in shared memory, where each thread keeps its own
// elements: registers hold S, g, A and B.
#pragma once

#include "forward.h"

namespace dream::cuda {

// Of a row and split: dQ, E, the documents' mean and the rest's.
template <int D>
DREAM_DEVICE float* gradient_partial(const Parameters& p, int64_t b, const Row& row, int split) {
  return p.partial + split_index(p, b, row, split) * (2 * D + 2);
}

template <typename T, int D, int KIND, bool QUERY>
struct RowGradients {
  static constexpr int kWarps = D == 64 ? 4 : 2;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarps * 16;
  static constexpr int N = kTileKeys<D>;
  static constexpr int kRowTile = kRows * kRowBytes<D>;
  static constexpr int kSums = QUERY ? kRows * D * 4 : 0;
  static constexpr int kShared = 2 * kRowTile + Stages<D, kThreads>::kBytes +
                                 kSums * (KIND == kReweight ? 2 : 1);
  using Sums = float[D / 8][4];

  const Parameters& p;
  int b;
  int key_head;
  int split;
  Row rows[2];
  float delta[2], all[2];
  Sums of_gradient, of_keys;  // A and B
  float centre[2];               // c
  float weight[2], moment[2];    // this thread's part of sum p and of sum p g in the document
  float excess[2];               // and of the sum of logits' gradients
  float mean[2];               // sum of w_d mean_d, less delta
  float mass[2];
  float rest_mean[2];          // of g in the rest, where the mass is fixed

  // A thread's elements of dQ or E.
  DREAM_DEVICE float* own(int which, int n, int i) const {
    char* sums = shared_memory() + 2 * kRowTile + Stages<D, kThreads>::kBytes;
    return reinterpret_cast<float*>(sums + which * kSums) + (n * 4 + i) * kThreads + thread_index();
  }

  DREAM_DEVICE void find_delta() {
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      const Row& row = rows[half];
      const auto* o = row_address<uint32_t>(p.output, 0, 0, 0);
      const auto* d = row_address<uint32_t>(p.grad_output, 0, 0, 0);
      o += (b * p.output.batch + row.head * p.output.head + row.m * p.output.row) / 2;
      d += (b * p.grad_output.batch + row.head * p.grad_output.head + row.m * p.grad_output.row) / 2;
      float sum = 0.0f;
      if (row.valid) {
        for (int i = lane_index() % 4; i < D / 2; i += 4) {
          const uint32_t x = load(o + i), y = load(d + i);
          sum += unpack<T>(x) * unpack<T>(y) + unpack<T>(x >> 16) * unpack<T>(y >> 16);
        }
      }
      delta[half] = quad_sum(sum);
    }
  }

  // The logit that counts as 0 in a segment, so large for a row without keys that nothing is left.
  DREAM_DEVICE float norm_of(int half, const Tile& tile, bool scored) const {
    float norm = all[half];
    if (!rows[half].valid || rows[half].scored != scored) return kInf;
    if (scored && tile.document < p.documents) {
      if (KIND == kReweight) norm = load(state_of(p, b, rows[half], tile.document));
      if (KIND == kBias) norm -= log2_score(p, b, rows[half], tile.document);
    } else if (scored && p.fixed_mass) {
      norm = load(state_of(p, b, rows[half], p.documents));
    }
    return norm == -kInf ? kInf : norm;
  }

  // Of g in the document so far.
  DREAM_DEVICE float mean_of(int half) const {
    const float sum = quad_sum(weight[half]), sum_g = quad_sum(moment[half]);
    return sum > 0.0f ? sum_g / sum : delta[half];
  }

  // A + (c - c') B is A with c' in the place of c.
  DREAM_DEVICE void move_centre(int half, float to, bool holds_some) {
    const float by = centre[half] - to;
    centre[half] = to;
    if (!holds_some) return;
    DREAM_UNROLL for (int n = 0; n < D / 8; ++n) {
      DREAM_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
        of_gradient[n][i] += by * of_keys[n][i];
      }
    }
  }

  // Turns logits and g into p and p (g - c).
  DREAM_DEVICE void visit(float (&s)[N / 8][4], float (&g)[N / 8][4], const Tile& tile,
                          const int32_t* positions, bool scored, bool centred) {
    const bool causal = p.causal && (!scored || tile.document == p.documents) &&
                        positions[tile.count - 1] > limit_of(p, 0);
    if (tile.count < N || causal) {
      const int last[2] = {causal ? rows[0].limit : p.length, causal ? rows[1].limit : p.length};
      DREAM_UNROLL for (int n = 0; n < N / 8; ++n) {
        DREAM_UNROLL for (int i = 0; i < 4; ++i) {
          const int column = fragment_column(n, i);
          const bool hidden = (column >= tile.count) | (positions[column] > last[i / 2]);
          s[n][i] = hidden ? -kInf : s[n][i] * p.log2_scale;
        }
      }
    } else {
      DREAM_UNROLL for (int n = 0; n < N / 8; ++n) {
        DREAM_UNROLL for (int i = 0; i < 4; ++i) s[n][i] *= p.log2_scale;
      }
    }
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      const float norm = norm_of(half, tile, scored);
      float sum = 0.0f, sum_g = 0.0f;
      DREAM_UNROLL for (int n = 0; n < N / 8; ++n) {
        DREAM_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = exp2(s[n][i] - norm);
          sum += s[n][i];
          sum_g += s[n][i] * g[n][i];
        }
      }
      if (centred) {
        weight[half] += sum;
        moment[half] += sum_g;
        if (QUERY) move_centre(half, mean_of(half), !(tile.ends & kOpens));
      }
      DREAM_UNROLL for (int n = 0; n < N / 8; ++n) {
        DREAM_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
          g[n][i] = s[n][i] * (g[n][i] - centre[half]);
          excess[half] += g[n][i];
        }
      }
    }
  }

  DREAM_DEVICE void add(int which, int half, const Sums& x, float factor) {
    DREAM_UNROLL for (int n = 0; n < D / 8; ++n) {
      DREAM_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
        *own(which, n, i) += factor * x[n][i];
      }
    }
  }

  // A document of reweight, or the rest with a mass of its own.
  DREAM_DEVICE void close(const Tile& tile) {
    const bool rest = tile.document == p.documents;
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      const float own_mean = mean_of(half);
      weight[half] = moment[half] = 0.0f;
      const Row& row = rows[half];
      if (!row.scored) continue;
      float factor = 1.0f - mass[half], share = 0.0f;
      if (rest) {
        rest_mean[half] = own_mean;
      } else {
        const float w = load(p.weights + score_index(p, b, row, tile.document));
        const float log = load(state_of(p, b, row, tile.document));
        factor = mass[half] * w;
        share = all[half] == -kInf ? 0.0f : exp2(log - all[half]);
        mean[half] += w * own_mean;
        if (lane_index() % 4 == 0) {
          store(p.means + slot_index(p, b, row, p.documents, tile.document),
                own_mean - delta[half]);
        }
      }
      if constexpr (QUERY && KIND == kReweight) {
        add(0, half, of_gradient, factor);
        if (!rest && !p.fixed_mass) add(1, half, of_keys, share);
      }
    }
    if constexpr (QUERY) {
      clear(of_gradient);
      clear(of_keys);
    }
  }

  // A document of bias: the logits' gradients in it, summed.
  DREAM_DEVICE void close_bias(int d) {
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(excess[half]);
      excess[half] = 0.0f;
      if (!rows[half].scored || lane_index() % 4 != 0) continue;
      store(p.means + slot_index(p, b, rows[half], p.documents, d), sum);
    }
  }

  // What is centred on delta goes into dQ as it is.
  DREAM_DEVICE void close_plain() {
    if constexpr (QUERY) {
      DREAM_UNROLL for (int half = 0; half < 2; ++half) {
        add(0, half, of_gradient, 1.0f);
      }
    }
  }

  DREAM_DEVICE void begin(bool scored) {
    if constexpr (QUERY) {
      clear(of_gradient);
      clear(of_keys);
    }
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      weight[half] = moment[half] = excess[half] = mass[half] = rest_mean[half] = 0.0f;
      mean[half] = split == 0 ? -delta[half] : 0.0f;
      centre[half] = delta[half];
      if (!rows[half].valid || rows[half].scored != scored || !scored || KIND != kReweight) continue;
      const float rest = load(state_of(p, b, rows[half], p.documents));
      const float documents = load(state_of(p, b, rows[half], p.documents + 1));
      mass[half] = shares_of(p, documents, rest, all[half]).documents;
    }
  }

  DREAM_DEVICE void save_numbers(bool scored) const {
    if (lane_index() % 4 != 0) return;
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      const Row& row = rows[half];
      if (!row.valid || row.scored != scored) continue;
      const int64_t at = slot_index(p, b, row, 1, 0);
      const bool fixed = scored && KIND == kReweight && p.fixed_mass;
      store(p.numbers.norm + at, all[half]);
      store(p.numbers.delta + at, delta[half]);
      store(p.numbers.mass + at, mass[half]);
      store(p.numbers.mean + at, mean[half]);
      store(p.numbers.rest_norm + at, fixed ? load(state_of(p, b, row, p.documents)) : all[half]);
      store(p.numbers.rest_factor + at, fixed ? 1.0f - mass[half] : 1.0f);
      store(p.numbers.rest_offset + at,
            fixed ? (mass[half] - 1.0f) * rest_mean[half] : -delta[half]);
    }
  }

  DREAM_DEVICE void pass(const Counts& counts, bool scored, int limit, Shared query, Shared grad,
                         Stages<D, kThreads> stages) {
    const bool by_document = scored && KIND == kReweight;
    Walk walk = Walk::of(p, b, counts, scored, limit);
    // The rest matters to dQ, and to its own mean where the mass is fixed.
    if (!QUERY && !(by_document && p.fixed_mass)) walk.end = walk.document_tiles;
    walk.take_documents(p, split, p.splits, by_document && p.fixed_mass);
    const bool active = warp_has(rows, scored);
    begin(scored);
    walk_over<true>(p, b, key_head, walk, stages, [&](const Tile& tile, int stage, bool last) {
      if (!active) return;
      float s[N / 8][4], g[N / 8][4];
      const int groups = (tile.count + 15) / 16;
      const bool centred = by_document && (tile.document < p.documents || p.fixed_mass);
      if (by_document && !centred && (tile.ends & kOpens)) centre[0] = delta[0], centre[1] = delta[1];
      multiply_rows<T, D, N>(s, query, stages.keys(stage), groups);
      multiply_rows<T, D, N>(g, grad, stages.values(stage), groups);
      visit(s, g, tile, stages.positions(stage), scored, centred);
      if constexpr (QUERY) {
        add_product<T, D, N>(of_gradient, g, stages.keys(stage), groups);
        if (KIND == kReweight && centred) {
          add_product<T, D, N>(of_keys, s, stages.keys(stage), groups);
        }
      }
      if (!(tile.ends & kCloses) && !(last && centred)) return;
      if constexpr (KIND == kReweight) {
        close(tile);
      } else {
        close_bias(tile.document);
      }
    });
    if (!active) return;
    close_plain();
    if (split == 0) save_numbers(scored);
    if (p.splits > 1) return leave(scored);
    if constexpr (QUERY) store_gradient(scored);
  }

  // What splits leave to be joined: dQ and E, the means.
  DREAM_DEVICE void leave(bool scored) {
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      const bool own_row = rows[half].valid && rows[half].scored == scored;
      float* target = gradient_partial<D>(p, opaque(b), rows[half], opaque(split));
      if constexpr (QUERY) {
        DREAM_UNROLL for (int n = 0; n < D / 8; ++n) {
          DREAM_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
            const int column = fragment_column(n, i);
            if (own_row) store(target + column, *own(0, n, i));
            if (own_row && KIND == kReweight) store(target + D + column, *own(1, n, i));
            *own(0, n, i) = 0.0f;
          }
        }
      }
      if (!own_row || lane_index() % 4 != 0) continue;
      store(target + 2 * D, mean[half]);
      store(target + 2 * D + 1, rest_mean[half]);
    }
  }

  DREAM_DEVICE void store_gradient(bool scored) {
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      const float of_shares = p.fixed_mass ? 0.0f : mean[half];
      DREAM_UNROLL for (int n = 0; n < D / 8; ++n) {
        DREAM_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
          float x = *own(0, n, i);
          *own(0, n, i) = 0.0f;
          if (KIND == kReweight && scored) {
            x += of_shares * *own(1, n, i);
          }
          of_gradient[n][i] = x;
        }
      }
      if (!rows[half].valid || rows[half].scored != scored) continue;
      auto* target = row_address<uint16_t>(p.grad_query, opaque(b), rows[half].head, rows[half].m);
      store_row<T, D>(target, of_gradient, half, p.scale);
    }
  }

  static DREAM_DEVICE void run(const Parameters& p) {
    const int block = block_x() / p.splits;
    RowGradients r{p, block_z(), block_y(), block_x() - block * p.splits, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    const Counts counts = load(p.counts + r.b);
    const int first = block * kRows;
    const Shared queries = shared_address(shared_memory()), grads = queries + kRowTile;
    copy_rows<D, kRows, kThreads, true>(p, r.b, r.key_head, first, queries, grads);
    commit_copies();
    const int own = warp_index() * 16 + lane_index() / 4;
    DREAM_UNROLL for (int half = 0; half < 2; ++half) {
      r.rows[half] = row_of(p, r.key_head, first + own + 8 * half, counts.first_scored);
      r.all[half] = r.rows[half].valid ? load(state_of(p, r.b, r.rows[half], p.slots - 1)) : -kInf;
    }
    r.find_delta();
    if constexpr (QUERY) {
      DREAM_UNROLL for (int i = 0; i < D / 2; ++i) {
        *r.own(0, i / 4, i % 4) = 0.0f;
        if (KIND == kReweight) *r.own(1, i / 4, i % 4) = 0.0f;
      }
    }
    const Kinds kinds = kinds_of(p, r.key_head, first, first + kRows, counts.first_scored);
    const int limit = largest_limit(p, first, first + kRows);
    const int offset = warp_index() * 16 * kRowBytes<D>;
    const Stages<D, kThreads> stages{shared_memory() + 2 * kRowTile};
    DREAM_ONCE for (int plain = 0; plain < 2; ++plain) {
      if (!(plain ? kinds.plain : kinds.scored)) continue;
      r.pass(counts, !plain, limit, queries + offset, grads + offset, stages);
    }
  }
};

}  // namespace dream::cuda
