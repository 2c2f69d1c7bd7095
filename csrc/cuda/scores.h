// The scores' gradient: a warp for each document and row of scores sums over rows and heads, always in
// the same order.
#pragma once

#include "blocks.h"

namespace dream::cuda {

template <bool BIAS>
struct ScoreGradients {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kShared = 0;

  static DREAM_DEVICE void run(const Parameters& p) {
    const int64_t b = block_z();
    const int d = block_x() * kWarps + warp_index(), score_head = block_y();
    if (d >= p.documents) return;
    const int64_t target = (b * p.score_heads + score_head) * p.documents + d;
    const int64_t* span = p.spans + (b * p.documents + d) * 2;
    const bool present = load(span) < load(span + 1);
    const int first = load(p.counts + b).first_scored;
    const int begin = p.score_heads > 1 ? score_head : 0;
    const int end = p.score_heads > 1 ? score_head + 1 : p.query_heads;
    float sum = 0.0f;
    DREAM_ONCE for (int head = begin; head < end; ++head) {
      if (!p.scored[head] || !present) continue;
      const int64_t row = (b * p.query_heads + head) * p.rows;
      const float* means = p.means + ((b * p.query_heads + head) * p.documents + d) * p.rows;
      DREAM_ONCE for (int m = first + lane_index(); m < p.rows; m += kWarp) {
        const float x = load(means + m);
        sum += BIAS ? x : load(p.numbers.mass + row + m) * (x - load(p.numbers.mean + row + m));
      }
    }
    for (int mask = 1; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane_index() != 0) return;
    store(p.grad_scores + target, BIAS ? sum : sum * load(p.weights + target));
  }
};

}  // namespace dream::cuda
