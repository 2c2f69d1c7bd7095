#include "attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "kernel/kernel.h"
#include "layout.h"
#include "parallel.h"
#include "workspace.h"

namespace dream::cpu {
namespace {

// Multiply-adds that are worth the start of another thread.
constexpr double kWorkPerThread = 2e6;

int useful_threads(const Problem& p, int threads) {
  const double work = static_cast<double>(p.batch * p.query_heads) * p.rows *
                      (p.prefix_length + p.local_length) * p.head_dim;
  return static_cast<int>(std::min<double>(threads, 1.0 + work / kWorkPerThread));
}

// One workspace per worker, made when the worker first needs it.
class Workspaces {
 public:
  template <typename Make>
  Workspace& get(int worker, const Make& make) {
    auto& memory = memories_[worker];
    if (memory == nullptr) memory = std::make_unique<WorkspaceMemory>(make());
    return memory->get();
  }

  explicit Workspaces(int workers) : memories_(workers) {}

 private:
  std::vector<std::unique_ptr<WorkspaceMemory>> memories_;
};

std::vector<RowBlockIndex> list_row_blocks(const Problem& p, const Layout& layout,
                                           std::initializer_list<RowKind> kinds) {
  std::vector<RowBlockIndex> blocks;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.key_heads; ++h) {
      for (const RowKind kind : kinds) layout.append_row_blocks(b, h, kind, &blocks);
    }
  }
  return blocks;
}

// Runs `body(row block, workspace)` for every row block, in parallel.
template <typename Make, typename Body>
void for_each_row_block(const Problem& p, const Layout& layout,
                        const std::vector<RowBlockIndex>& blocks, int threads, const Make& make,
                        const Body& body) {
  threads = useful_threads(p, threads);
  Workspaces workspaces(threads);
  parallel_for(static_cast<int64_t>(blocks.size()), threads, [&](int worker, int64_t task) {
    RowBlock rows;
    layout.fill(blocks[task], &rows);
    body(rows, workspaces.get(worker, make));
  });
}

// Gradients of the keys of one key head, summed over all row blocks that read them.
class KeyGradients {
 public:
  KeyGradients(const Problem& problem, const Gradients& gradients, const Kernel& kernel,
               Workspace& workspace)
      : problem_(problem), gradients_(gradients), kernel_(kernel), w_(workspace) {}

  void clear(int64_t first, int64_t last) {
    clear_range(w_.key_range, first, last, w_.key_grad);
    clear_range(w_.value_range, first, last, w_.value_grad);
  }

  void store_prefix(int64_t batch, int64_t head) {
    store(gradients_.prefix_key, w_.key_grad, 0, problem_.scale, batch, head);
    store(gradients_.prefix_value, w_.value_grad, 0, 1.0f, batch, head);
  }

  void store_local(int64_t batch, int64_t head) {
    const int64_t start = problem_.prefix_length;
    store(gradients_.key, w_.key_grad, start - w_.key_range.first, problem_.scale, batch, head);
    store(gradients_.value, w_.value_grad, start - w_.value_range.first, 1.0f, batch, head);
  }

 private:
  int64_t dim() const { return (problem_.head_dim + kLaneUnit - 1) / kLaneUnit * kLaneUnit; }

  void clear_range(const KeyRange& range, int64_t first, int64_t last, float* sums) {
    first = std::max(first, range.first);
    last = std::min(last, range.last);
    if (first < last) {
      std::fill(sums + (first - range.first) * dim(), sums + (last - range.first) * dim(), 0.0f);
    }
  }

  void store(const Operand& target, const float* sums, int64_t offset, float factor, int64_t batch,
             int64_t head) {
    if (target.data == nullptr) return;
    const int64_t size = problem_.dtype == DType::kFloat32 ? 4 : 2;
    for (int64_t n = 0; n < target.shape[2]; ++n) {
      const int64_t at =
          batch * target.strides[0] + head * target.strides[1] + n * target.strides[2];
      kernel_.store_row(problem_.dtype, sums + (offset + n) * dim(), 1, factor,
                        static_cast<char*>(target.data) + at * size, target.strides[3],
                        problem_.head_dim);
    }
  }

  const Problem& problem_;
  const Gradients& gradients_;
  const Kernel& kernel_;
  Workspace& w_;
};

// Sums the scored rows' [B, Hq, M, C] over rows, and over heads when the scores have one head.
void reduce_scores(const Problem& p, const Layout& layout, const float* row_scores,
                   const Operand& target) {
  const auto* receives = static_cast<const uint8_t*>(p.heads.data);
  const int64_t score_heads = target.shape[1];
  std::vector<double> sums(p.documents);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.query_heads; ++h) {
      if (h == 0 || score_heads > 1) std::fill(sums.begin(), sums.end(), 0.0);
      const float* rows = row_scores + (b * p.query_heads + h) * p.rows * p.documents;
      const bool scored = receives[h * p.heads.strides[0]] != 0;
      for (int64_t m = layout.batch(b).first_scored; scored && m < p.rows; ++m) {
        for (int64_t c = 0; c < p.documents; ++c) sums[c] += rows[m * p.documents + c];
      }
      if (score_heads == 1 && h + 1 < p.query_heads) continue;
      float* out = static_cast<float*>(target.data) + b * target.strides[0] +
                   (score_heads == 1 ? 0 : h) * target.strides[1];
      for (int64_t c = 0; c < p.documents; ++c) {
        out[c * target.strides[2]] = static_cast<float>(sums[c]);
      }
    }
  }
}

}  // namespace

void forward(const Problem& problem, const Operand& output, float* state, int threads) {
  const Kernel& kernel = selected_kernel();
  const Layout layout(problem);
  for_each_row_block(
      problem, layout, list_row_blocks(problem, layout, {RowKind::kScored, RowKind::kPlain}),
      threads, [&] { return WorkspaceMemory::for_forward(problem); },
      [&](const RowBlock& rows, Workspace& w) {
        kernel.forward(problem, layout.batch(rows.batch), rows, output, state, w);
      });
}

void backward(const Problem& problem, const float* state, const Operand& grad_output,
              const Gradients& gradients, int threads) {
  const Kernel& kernel = selected_kernel();
  const Layout layout(problem);
  std::unique_ptr<float[]> row_scores;
  if (gradients.scores.data != nullptr) {
    row_scores.reset(
        new float[problem.batch * problem.query_heads * problem.rows * problem.documents]);
  }
  const auto make = [&] { return WorkspaceMemory::for_backward(problem, gradients); };
  const auto body = [&](const RowBlock& rows, Workspace& w) {
    kernel.backward(problem, layout.batch(rows.batch), rows, state, grad_output, gradients.query,
                    row_scores.get(), w);
  };
  const bool to_prefix =
      gradients.prefix_key.data != nullptr || gradients.prefix_value.data != nullptr;
  const bool to_local = gradients.key.data != nullptr || gradients.value.data != nullptr;
  if (!to_prefix && !to_local) {
    auto blocks = list_row_blocks(problem, layout, {RowKind::kScored});
    if (gradients.query.data != nullptr) {
      blocks = list_row_blocks(problem, layout, {RowKind::kScored, RowKind::kPlain});
    }
    for_each_row_block(problem, layout, blocks, threads, make, body);
  } else {
    // A key's gradient is a sum over row blocks, so one task takes all that share a key head: of
    // one batch element, or of the whole batch where it shares the prefix.
    const bool shared = to_prefix && problem.prefix_key.shape[0] == 1;
    const int64_t batches = shared ? problem.batch : 1;
    const int64_t tasks = problem.key_heads * problem.batch / batches;
    threads = useful_threads(problem, threads);
    Workspaces workspaces(threads);
    parallel_for(tasks, threads, [&](int worker, int64_t task) {
      Workspace& w = workspaces.get(worker, make);
      KeyGradients sums(problem, gradients, kernel, w);
      const int64_t head = task % problem.key_heads;
      const int64_t first = shared ? 0 : task / problem.key_heads;
      sums.clear(0, problem.prefix_length);
      for (int64_t b = first; b < first + batches; ++b) {
        sums.clear(problem.prefix_length, problem.prefix_length + problem.local_length);
        std::vector<RowBlockIndex> blocks;
        layout.append_row_blocks(b, head, RowKind::kScored, &blocks);
        layout.append_row_blocks(b, head, RowKind::kPlain, &blocks);
        for (const RowBlockIndex& index : blocks) {
          RowBlock rows;
          layout.fill(index, &rows);
          body(rows, w);
        }
        sums.store_local(b, head);
      }
      sums.store_prefix(first, head);
    });
  }
  if (row_scores != nullptr) reduce_scores(problem, layout, row_scores.get(), gradients.scores);
}

void document_mass(const Problem& problem, float* mass, int threads) {
  const Kernel& kernel = selected_kernel();
  const Layout layout(problem);
  for_each_row_block(
      problem, layout, list_row_blocks(problem, layout, {RowKind::kAll}), threads,
      [&] { return WorkspaceMemory::for_mass(problem); },
      [&](const RowBlock& rows, Workspace& w) {
        kernel.mass(problem, layout.batch(rows.batch), rows, mass, w);
      });
}

}  // namespace dream::cpu
