#include "workspace.h"

#include <algorithm>

namespace dream::cpu {
namespace {

constexpr int64_t kAlignment = 64 / sizeof(float);

// What a backward row block keeps between its two sweeps; with the rest of a workspace it stays
// under 1 MiB, about what a core's own cache holds. Keys beyond that are computed twice.
constexpr int64_t kRetainedBytes = 800 << 10;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

int64_t padded_head_dim(const Problem& p) { return round_up(p.head_dim, kLaneUnit); }

// Hands out aligned pieces; with a null base it only adds up their sizes.
class Carver {
 public:
  explicit Carver(float* base) : base_(base) {}

  float* take(int64_t floats) {
    float* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(floats, kAlignment);
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

void plan_mass(const Problem& p, Carver* carver, Workspace* w) {
  const int64_t dim = padded_head_dim(p);
  w->query_columns = carver->take(dim * kMaxLanes);
  w->key_block = carver->take(kKeyBlock * dim);
  w->logits = carver->take(kKeyBlock * kMaxLanes);
  w->lse = carver->take((p.documents + 1) * kMaxLanes);
  w->factor = carver->take((p.documents + 1) * kMaxLanes);
}

void plan_forward(const Problem& p, Carver* carver, Workspace* w) {
  const int64_t dim = padded_head_dim(p);
  plan_mass(p, carver, w);
  w->pairs = carver->take(kKeyBlock * kMaxLanes / 2);
  w->share = carver->take(kKeyBlock * kMaxLanes);
  w->total = carver->take(kKeyBlock * kMaxLanes);
  w->segment_sum = carver->take(dim * kMaxLanes);
  w->documents_sum = carver->take(dim * kMaxLanes);
  w->scores = carver->take((p.documents + 1) * kMaxLanes);
}

void plan_scores(const Problem& p, Carver* carver, Workspace* w) {
  w->grad_rows = carver->take(padded_head_dim(p) * kMaxLanes);
  w->key_block = carver->take(padded_head_dim(p));
  for (float** slots : {&w->lse, &w->factor, &w->scores, &w->products_mean, &w->shift}) {
    *slots = carver->take((p.documents + 1) * kMaxLanes);
  }
}

void plan_backward(const Problem& p, const Gradients& gradients, Carver* carver, Workspace* w) {
  const int64_t dim = padded_head_dim(p);
  plan_mass(p, carver, w);
  const bool to_key = gradients.key.data != nullptr || gradients.prefix_key.data != nullptr;
  const bool to_value = gradients.value.data != nullptr || gradients.prefix_value.data != nullptr;
  w->grad_columns = carver->take(dim * kMaxLanes);
  if (to_key) w->query_rows = carver->take(dim * kMaxLanes);
  if (to_value) w->grad_rows = carver->take(dim * kMaxLanes);
  w->products = carver->take(kKeyBlock * kMaxLanes);
  w->pairs = carver->take(kKeyBlock * kMaxLanes / 2);
  w->segment_sum = carver->take(dim * kMaxLanes);
  w->scores = carver->take((p.documents + 1) * kMaxLanes);
  w->products_mean = carver->take((p.documents + 1) * kMaxLanes);
  w->correction = carver->take((p.documents + 1) * kMaxLanes);
  w->shift = carver->take((p.documents + 1) * kMaxLanes);
  if (p.softcap > 0.0f) w->slopes = carver->take(kKeyBlock * kMaxLanes);
  if (p.sinks.data != nullptr) w->sinks = carver->take(kMaxLanes);
  if (gradients.query.data != nullptr || to_key || to_value) {
    const int64_t per_key = (p.softcap > 0.0f ? 3 : 2) * kMaxLanes;
    const int64_t most = kRetainedBytes / (per_key * static_cast<int64_t>(sizeof(float)));
    // Padding of blocks at most multiplies the number of keys by kKeyUnit.
    w->retained_keys = std::min(most, kKeyUnit * (p.prefix_length + p.local_length));
    w->retained = carver->take(per_key * w->retained_keys);
  }
}

}  // namespace

template <typename Plan>
WorkspaceMemory::WorkspaceMemory(const Plan& plan) {
  Carver size(nullptr);
  plan(&size, &workspace_);
  memory_.emplace(size.used() + kAlignment);
  const auto address = reinterpret_cast<uintptr_t>(memory_->data());
  Carver carver(memory_->data() + (64 - address % 64) % 64 / sizeof(float));
  plan(&carver, &workspace_);
}

WorkspaceMemory WorkspaceMemory::for_forward(const Problem& p) {
  return WorkspaceMemory([&](Carver* c, Workspace* w) { plan_forward(p, c, w); });
}

WorkspaceMemory WorkspaceMemory::for_scores(const Problem& p) {
  return WorkspaceMemory([&](Carver* c, Workspace* w) { plan_scores(p, c, w); });
}

WorkspaceMemory WorkspaceMemory::for_mass(const Problem& p) {
  return WorkspaceMemory([&](Carver* c, Workspace* w) { plan_mass(p, c, w); });
}

WorkspaceMemory WorkspaceMemory::for_backward(const Problem& p, const Gradients& gradients) {
  return WorkspaceMemory([&](Carver* c, Workspace* w) { plan_backward(p, gradients, c, w); });
}

}  // namespace dream::cpu
