#include "score_sums.h"

#include <algorithm>
#include <vector>

namespace dream::cpu {
namespace {

int64_t most_targets(const Problem& p, const Layout& layout) {
  int64_t most = 0;
  for (int64_t g = 0; g < layout.group_count(); ++g) {
    for (int64_t h = 0; h < p.key_heads; ++h) {
      most = std::max(most, layout.group(g).batches * layout.score_heads(h));
    }
  }
  return most;
}

}  // namespace

ScoreSums::ScoreSums(const Problem& problem, const Layout& layout, bool wanted)
    : problem_(problem),
      layout_(layout),
      size_(wanted ? most_targets(problem, layout) * problem.documents : 0),
      sums_(size_, layout.scored_block_count()) {}

void ScoreSums::finish(const Operand& gradient) const {
  const int64_t documents = problem_.documents, heads = gradient.shape[1];
  std::vector<double> totals(heads * documents);
  for (int64_t g = 0; g < layout_.group_count(); ++g) {
    const RowGroup& group = layout_.group(g);
    for (int64_t i = 0; i < group.batches; ++i) {
      std::fill(totals.begin(), totals.end(), 0.0);
      for (int64_t h = 0; h < problem_.key_heads; ++h) {
        const int64_t targets = layout_.score_heads(h);
        for (int64_t n = layout_.first_number(g, h); n < layout_.end_number(g, h); ++n) {
          for (int64_t t = 0; t < targets; ++t) {
            const float* sums = sums_.data() + n * size_ + (i * targets + t) * documents;
            double* total = totals.data() + layout_.score_head(h, t) * documents;
            for (int64_t c = 0; c < documents; ++c) total[c] += sums[c];
          }
        }
      }
      float* out = static_cast<float*>(gradient.data) +
                   (group.first_batch + i) * gradient.strides[0];
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t c = 0; c < documents; ++c) {
          out[h * gradient.strides[1] + c * gradient.strides[2]] =
              static_cast<float>(totals[h * documents + c]);
        }
      }
    }
  }
}

}  // namespace dream::cpu
