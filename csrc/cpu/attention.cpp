#include "attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "buffer.h"
#include "kernel/kernel.h"
#include "key_gradients.h"
#include "layout.h"
#include "parallel.h"
#include "score_sums.h"
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
  for (int64_t g = 0; g < layout.group_count(); ++g) {
    for (int64_t h = 0; h < p.key_heads; ++h) {
      for (const RowKind kind : kinds) layout.append_row_blocks(g, h, kind, &blocks);
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

// The sinks' gradient [Hq] from what every row [B, Hq, M] adds to it.
void sum_over_rows(const Problem& p, const float* of_row, const Operand& gradient) {
  for (int64_t h = 0; h < p.query_heads; ++h) {
    double total = 0.0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const float* rows = of_row + (b * p.query_heads + h) * p.rows;
      for (int64_t m = 0; m < p.rows; ++m) total += rows[m];
    }
    static_cast<float*>(gradient.data)[h * gradient.strides[0]] = static_cast<float>(total);
  }
}

}  // namespace

void forward(const Problem& problem, const Operand& output, float* state, void* segment_outputs,
             int threads) {
  const Passes& passes = selected_kernel().passes(problem.dtype);
  const Layout layout(problem);
  for_each_row_block(
      problem, layout, list_row_blocks(problem, layout, {RowKind::kScored, RowKind::kPlain}),
      threads, [&] { return WorkspaceMemory::for_forward(problem); },
      [&](const RowBlock& rows, Workspace& w) {
        passes.forward(problem, rows, output, state, segment_outputs, w);
      });
}

void backward(const Problem& problem, const float* state, const Operand& output,
              const Operand& grad_output, const Gradients& gradients, int threads) {
  const Kernel& kernel = selected_kernel();
  const Passes& passes = kernel.passes(problem.dtype);
  const Layout layout(problem);
  const bool to_scores = gradients.scores.data != nullptr;
  const ScoreSums score_sums(problem, layout, to_scores);
  const bool to_sinks = gradients.sinks.data != nullptr;
  const Buffer sink_gradients(to_sinks ? problem.batch * problem.query_heads * problem.rows : 0);
  const auto make = [&] { return WorkspaceMemory::for_backward(problem, gradients); };
  const auto body = [&](const RowBlock& rows, Workspace& w) {
    passes.backward(problem, rows, state, output, grad_output, gradients.query,
                    score_sums.of(rows), sink_gradients.data(), w);
  };
  const bool to_keys = gradients.key.data != nullptr || gradients.value.data != nullptr ||
                       gradients.prefix_key.data != nullptr ||
                       gradients.prefix_value.data != nullptr;
  threads = useful_threads(problem, threads);
  if (to_keys) {
    KeyGradients sums(problem, layout, gradients, kernel, threads);
    Workspaces workspaces(threads);
    parallel_for(sums.part_count(), threads, [&](int worker, int64_t part) {
      Workspace& w = workspaces.get(worker, make);
      sums.run_part(part, worker, &w, [&](const RowBlock& rows) { body(rows, w); });
    });
    parallel_for(sums.sum_count(), threads, [&](int, int64_t sum) { sums.finish_sum(sum); });
  } else {
    auto blocks = list_row_blocks(problem, layout, {RowKind::kScored});
    if (gradients.query.data != nullptr || to_sinks) {
      blocks = list_row_blocks(problem, layout, {RowKind::kScored, RowKind::kPlain});
    }
    for_each_row_block(problem, layout, blocks, threads, make, body);
  }
  if (to_scores) score_sums.finish(gradients.scores);
  if (to_sinks) sum_over_rows(problem, sink_gradients.data(), gradients.sinks);
}

void backward_of_scores(const Problem& problem, const float* state, const void* segment_outputs,
                        const Operand& grad_output, const Operand& grad_scores, int threads) {
  const Passes& passes = selected_kernel().passes(problem.dtype);
  const Layout layout(problem);
  const ScoreSums score_sums(problem, layout, true);
  for_each_row_block(
      problem, layout, list_row_blocks(problem, layout, {RowKind::kScored}), threads,
      [&] { return WorkspaceMemory::for_scores(problem); },
      [&](const RowBlock& rows, Workspace& w) {
        passes.scores(problem, rows, state, segment_outputs, grad_output, score_sums.of(rows), w);
      });
  score_sums.finish(grad_scores);
}

void document_mass(const Problem& problem, float* mass, int threads) {
  const Passes& passes = selected_kernel().passes(problem.dtype);
  const Layout layout(problem);
  for_each_row_block(
      problem, layout, list_row_blocks(problem, layout, {RowKind::kAll}), threads,
      [&] { return WorkspaceMemory::for_mass(problem); },
      [&](const RowBlock& rows, Workspace& w) { passes.mass(problem, rows, mass, w); });
}

}  // namespace dream::cpu
