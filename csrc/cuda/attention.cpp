#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace dream::cuda {
namespace {

// Segments of a state that are no documents: the rest, all documents, everything.
constexpr int64_t kOtherSlots = 3;
constexpr int64_t kRowNumbers = 7;

int64_t length_of(const Problem& p) { return p.prefix_length + p.local_length; }

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

int blocks(int64_t items, int64_t of) { return static_cast<int>((items + of - 1) / of); }

const Kernels& kernels(const Problem& p) {
  const Kernels* found = kernels_of(p.dtype, p.head_dim);
  if (found == nullptr) throw std::invalid_argument("no kernels for this dtype and head size");
  return *found;
}

int64_t tile_limit(const Problem& p) {
  return length_of(p) / kernels(p).tile_keys + p.documents;
}

// Cuts a workspace into arrays, or only adds up their sizes.
class Cutter {
 public:
  explicit Cutter(const Workspace& workspace) : workspace_(workspace) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += aligned(count * static_cast<int64_t>(sizeof(T)));
    if (workspace_.data == nullptr) return nullptr;
    if (used_ > workspace_.bytes) throw std::invalid_argument("a workspace is too small");
    return reinterpret_cast<T*>(static_cast<char*>(workspace_.data) + at);
  }

  int64_t used() const { return used_; }

 private:
  Workspace workspace_;
  int64_t used_ = 0;
};

int64_t cut_plan(const Problem& p, const Workspace& workspace, Parameters* q) {
  Cutter cutter(workspace);
  q->before = cutter.take<int32_t>(p.batch * (length_of(p) + 1));
  q->keys = cutter.take<int32_t>(p.batch * 3 * length_of(p));
  q->tiles = cutter.take<Tile>(p.batch * tile_limit(p));
  q->counts = cutter.take<Counts>(p.batch);
  q->weights = cutter.take<float>(p.batch * p.scores.shape[1] * p.documents);
  return cutter.used();
}

int64_t cut_partial(const Problem& p, int splits, const Workspace& workspace, Parameters* q) {
  Cutter cutter(workspace);
  const int64_t rows = p.batch * p.query_heads * p.rows;
  q->partial = splits > 1 ? cutter.take<float>(splits * 3 * rows * (p.head_dim + 2)) : nullptr;
  return cutter.used();
}

int64_t cut_backward(const Problem& p, int splits, const Workspace& workspace, Parameters* q) {
  Cutter cutter(workspace);
  const int64_t rows = p.batch * p.query_heads * p.rows;
  q->means = cutter.take<float>(rows * p.documents);
  RowNumbers& numbers = q->numbers;
  float** const each[kRowNumbers] = {&numbers.norm,        &numbers.rest_norm, &numbers.rest_factor,
                                     &numbers.rest_offset, &numbers.mass,      &numbers.mean,
                                     &numbers.delta};
  for (float** array : each) *array = cutter.take<float>(rows);
  if (splits > 1) q->partial = cutter.take<float>(splits * rows * (2 * p.head_dim + 2));
  return cutter.used();
}

Rows rows_of(const Operand& operand) {
  return {static_cast<char*>(operand.data), operand.strides[0], operand.strides[1],
          static_cast<int32_t>(operand.strides[2])};
}

// What is the same in forward and backward.
Parameters parameters_of(const Problem& p, const Workspace& plan, float* state, bool mass = false) {
  Parameters q{};
  q.batch = static_cast<int32_t>(p.batch);
  q.query_heads = static_cast<int32_t>(p.query_heads);
  q.key_heads = static_cast<int32_t>(p.key_heads);
  q.group = q.query_heads / q.key_heads;
  q.rows = static_cast<int32_t>(p.rows);
  q.head_dim = static_cast<int32_t>(p.head_dim);
  q.prefix = static_cast<int32_t>(p.prefix_length);
  q.length = static_cast<int32_t>(length_of(p));
  q.documents = static_cast<int32_t>(p.documents);
  q.score_heads = static_cast<int32_t>(p.scores.shape[1]);
  q.slots = static_cast<int32_t>(mass ? p.documents + kOtherSlots : state_slots(p));
  q.tile_keys = kernels(p).tile_keys;
  q.tile_limit = static_cast<int32_t>(tile_limit(p));
  q.splits = 1;
  q.causal = p.causal;
  q.fixed_mass = p.fixed_mass;
  q.document_mass = p.document_mass;
  q.scale = p.scale;
  q.log2_scale = static_cast<float>(p.scale / std::log(2.0));
  q.query = rows_of(p.query);
  q.key = rows_of(p.key);
  q.value = rows_of(p.value);
  q.prefix_key = rows_of(p.prefix_key);
  q.prefix_value = rows_of(p.prefix_value);
  q.scores = static_cast<const float*>(p.scores.data);
  std::copy(p.scores.strides, p.scores.strides + 3, q.score_strides);
  q.spans = static_cast<const int64_t*>(p.spans.data);
  q.mask = static_cast<const uint8_t*>(p.mask.data);
  cut_plan(p, plan, &q);
  q.state = state;
  const auto* scored = static_cast<const uint8_t*>(p.heads.data);
  for (int key_head = 0; key_head < q.key_heads; ++key_head) {
    int next = key_head * q.group;
    for (const bool first : {true, false}) {
      for (int i = 0; i < q.group; ++i) {
        const int head = key_head * q.group + i;
        q.scored[head] = scored[head] != 0;
        if (q.scored[head] == first) q.order[next++] = static_cast<int16_t>(head);
        q.scored_count[key_head] += first && q.scored[head];
      }
    }
  }
  return q;
}


void launch(Launcher& launcher, const Kernel& kernel, int x, int y, int z, const Parameters& q) {
  if (x == 0 || y == 0 || z == 0) return;
  launcher.launch(kernel, {x, y, z}, q);
}

void launch_over_rows(Launcher& launcher, const Kernel& kernel, int rows, const Parameters& q) {
  const int count = blocks(int64_t{q.group} * q.rows, rows);
  launch(launcher, kernel, count * q.splits, q.key_heads, q.batch, q);
}

// A warp for each row.
void launch_joining(Launcher& launcher, const Kernel& kernel, const Parameters& q) {
  const int count = blocks(int64_t{q.group} * q.rows, kernel.threads / 32);
  launch(launcher, kernel, count, q.key_heads, q.batch, q);
}

}  // namespace

HostLauncher::HostLauncher(const Problem& p) {
  for (const Operand* operand : {&p.query, &p.key, &p.value, &p.prefix_key, &p.prefix_value}) {
    allow(*operand, 4, 2, false);
  }
  allow(p.scores, 3, 4, false);
  allow(p.spans, 3, 8, false);
  allow(p.mask, 2, 1, false);
}

void HostLauncher::allow(const Operand& operand, int dimensions, int64_t element_size,
                         bool writable) {
  if (operand.data == nullptr) return;
  int64_t last = 0;
  for (int i = 0; i < dimensions; ++i) {
    if (operand.shape[i] == 0) return;
    last += (operand.shape[i] - 1) * operand.strides[i];
  }
  const auto* begin = static_cast<const char*>(operand.data);
  memory_.push_back({begin, begin + (last + 1) * element_size, writable});
}

void HostLauncher::allow(const Workspace& workspace, bool filled) {
  auto* begin = static_cast<char*>(workspace.data);
  if (begin == nullptr) return;
  if (!filled) std::memset(begin, 0xff, workspace.bytes);
  memory_.push_back({begin, begin + workspace.bytes, !filled});
}

void HostLauncher::launch(const Kernel& kernel, const int (&grid)[3],
                          const Parameters& parameters) {
  emulator::launch(kernel.run, &parameters, grid, kernel.threads, kernel.shared_bytes, memory_);
}

int64_t state_slots(const Problem& p) {
  return p.mode == Mode::kBias ? 1 : p.documents + kOtherSlots;
}

int64_t plan_bytes(const Problem& p) {
  Parameters q{};
  return cut_plan(p, {}, &q);
}

int64_t partial_bytes(const Problem& p, int splits) {
  Parameters q{};
  return cut_partial(p, splits, {}, &q);
}

int64_t backward_bytes(const Problem& p, int splits) {
  Parameters q{};
  return cut_backward(p, splits, {}, &q);
}

void forward(const Problem& p, const ForwardCall& call, Launcher& launcher) {
  Parameters q = parameters_of(p, call.plan, call.state);
  cut_partial(p, call.splits, call.partial, &q);
  q.splits = call.splits;
  q.output = rows_of(call.output);
  const bool bias = p.mode == Mode::kBias;
  const Kernels& own = kernels(p);
  launch(launcher, common_kernels().plan, q.batch, 1, 1, q);
  launch_over_rows(launcher, bias ? own.forward_bias : own.forward_reweight, own.forward_rows, q);
  if (q.splits > 1) launch_joining(launcher, bias ? own.combine_bias : own.combine_reweight, q);
}

void backward(const Problem& p, const BackwardCall& call, Launcher& launcher) {
  Parameters q = parameters_of(p, call.plan, call.state);
  cut_backward(p, call.splits, call.memory, &q);
  q.splits = call.splits;
  q.output = rows_of(call.output);
  q.grad_output = rows_of(call.grad_output);
  const Gradients& gradients = call.gradients;
  q.grad_query = rows_of(gradients.query);
  q.grad_scores = static_cast<float*>(gradients.scores.data);
  const bool bias = p.mode == Mode::kBias;
  const bool of_query = gradients.query.data != nullptr;
  const Kernels& own = kernels(p);
  const Kernel& over_rows = of_query ? (bias ? own.query_bias : own.query_reweight)
                                     : (bias ? own.rows_bias : own.rows_reweight);
  launch_over_rows(launcher, over_rows, own.gradient_rows, q);
  if (q.splits > 1) launch_joining(launcher, bias ? own.join_bias : own.join_reweight, q);
  if (q.grad_scores != nullptr) {
    const Kernel& over_scores =
        bias ? common_kernels().scores_bias : common_kernels().scores_reweight;
    launch(launcher, over_scores, blocks(q.documents, over_scores.threads / 32), q.score_heads,
           q.batch, q);
  }
  q.grad_key = rows_of(gradients.key);
  q.grad_value = rows_of(gradients.value);
  q.grad_prefix_key = rows_of(gradients.prefix_key);
  q.grad_prefix_value = rows_of(gradients.prefix_value);
  const bool of_prefix = q.grad_prefix_key.data != nullptr || q.grad_prefix_value.data != nullptr;
  if (!of_prefix && q.grad_key.data == nullptr && q.grad_value.data == nullptr) return;
  const Kernel& over_keys = bias ? own.keys_bias : own.keys_reweight;
  const int tiles = q.tile_limit + blocks(q.length, q.tile_keys);
  q.shared_prefix = p.prefix_key.data != nullptr && p.prefix_key.strides[0] == 0;
  if (!of_prefix || !q.shared_prefix) {
    return launch(launcher, over_keys, tiles, q.key_heads, q.batch, q);
  }
  for (q.first_batch = 0; q.first_batch < q.batch; ++q.first_batch) {
    launch(launcher, over_keys, tiles, q.key_heads, 1, q);
  }
}

void masses(const Problem& p, float* state, const Workspace& plan, Launcher& launcher) {
  Parameters q = parameters_of(p, plan, state, true);
  const Kernels& own = kernels(p);
  launch(launcher, common_kernels().plan, q.batch, 1, 1, q);
  launch_over_rows(launcher, own.forward_mass, own.forward_rows, q);
}

}  // namespace dream::cuda
