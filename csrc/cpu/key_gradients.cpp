#include "key_gradients.h"

#include <algorithm>

namespace dream::cpu {
namespace {

// Enough parts to occupy the cores of a large machine evenly, as far as their buffers stay small.
constexpr int64_t kWantedParts = 32;
constexpr int64_t kBufferBytes = 16 << 20;

KeyRange wanted_range(const Problem& p, const Layout& layout, bool prefix, bool local) {
  int64_t batches = 1;
  for (int64_t g = 0; g < layout.group_count(); ++g) {
    batches = std::max(batches, layout.group(g).batches);
  }
  const int64_t first = prefix ? 0 : p.prefix_length;
  const int64_t last = p.prefix_length + (local ? batches * p.local_length : 0);
  return {first, std::max(first, last)};
}

}  // namespace

KeyGradients::KeyGradients(const Problem& problem, const Layout& layout,
                           const Gradients& gradients, const Kernel& kernel, int workers)
    : problem_(problem),
      layout_(layout),
      gradients_(gradients),
      kernel_(kernel),
      dim_((problem.head_dim + kLaneUnit - 1) / kLaneUnit * kLaneUnit),
      key_range_(wanted_range(problem, layout, gradients.prefix_key.data, gradients.key.data)),
      value_range_(
          wanted_range(problem, layout, gradients.prefix_value.data, gradients.value.data)) {
  const int64_t groups = layout.group_count();
  const bool to_prefix =
      gradients.prefix_key.data != nullptr || gradients.prefix_value.data != nullptr;
  one_sum_per_head_ = to_prefix && problem.prefix_key.shape[0] == 1 && groups > 1;
  sum_count_ = problem.key_heads * (one_sum_per_head_ ? 1 : groups);
  buffer_size_ = (key_range_.size() + value_range_.size()) * dim_;

  const int64_t most = one_sum_per_head_
                           ? groups
                           : static_cast<int64_t>(list_row_blocks(0, 0).size());
  const int64_t affordable =
      kBufferBytes / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(buffer_size_, 1);
  parts_per_sum_ = std::max<int64_t>(
      1, std::min({most, kWantedParts / sum_count_, affordable / sum_count_}));
  buffers_.emplace(buffer_size_, parts_per_sum_ > 1 ? part_count() : workers);
}

KeyGradients::Part KeyGradients::get_part(int64_t part) const {
  const int64_t sum = part / parts_per_sum_, index = part % parts_per_sum_;
  const int64_t groups = layout_.group_count();
  if (one_sum_per_head_) {
    return {sum, groups * index / parts_per_sum_, groups * (index + 1) / parts_per_sum_, 0, 1};
  }
  const int64_t group = sum / problem_.key_heads;
  return {sum % problem_.key_heads, group, group + 1, index, parts_per_sum_};
}

std::vector<RowBlockIndex> KeyGradients::list_row_blocks(int64_t group, int64_t key_head) const {
  std::vector<RowBlockIndex> blocks;
  layout_.append_row_blocks(group, key_head, RowKind::kScored, &blocks);
  layout_.append_row_blocks(group, key_head, RowKind::kPlain, &blocks);
  return blocks;
}

void KeyGradients::attach(int64_t part, int worker, Workspace* w) {
  float* buffer = buffers_->data() + buffer_size_ * (parts_per_sum_ > 1 ? part : worker);
  w->key_range = key_range_;
  w->value_range = value_range_;
  w->key_grad = buffer;
  w->value_grad = buffer + key_range_.size() * dim_;
}

void KeyGradients::clear(Which which, Workspace* w) const {
  const auto clear_range = [&](const KeyRange& range, float* sums) {
    const int64_t first =
        which == kAll ? range.first : std::min(std::max(range.first, problem_.prefix_length),
                                               range.last);
    std::fill(sums + (first - range.first) * dim_, sums + range.size() * dim_, 0.0f);
  };
  clear_range(key_range_, w->key_grad);
  clear_range(value_range_, w->value_grad);
}

void KeyGradients::finish_sum(int64_t sum) {
  float* total = buffers_->data() + sum * parts_per_sum_ * buffer_size_;
  for (int64_t part = 1; part < parts_per_sum_; ++part) {
    const float* buffer = total + part * buffer_size_;
    for (int64_t i = 0; i < buffer_size_; ++i) total[i] += buffer[i];
  }
  Workspace w{};
  attach(sum * parts_per_sum_, 0, &w);
  const Part part = get_part(sum * parts_per_sum_);
  // Over all groups, local keys were stored by their own part.
  if (!one_sum_per_head_) store_local(part.first_group, part.key_head, w);
  store_prefix(part.first_group, part.key_head, w);
}

void KeyGradients::store_local(int64_t group, int64_t key_head, const Workspace& w) const {
  const RowGroup& g = layout_.group(group);
  for (int64_t i = 0; i < g.batches; ++i) {
    const int64_t start = problem_.prefix_length + i * problem_.local_length;
    const int64_t batch = g.first_batch + i;
    store(gradients_.key, w.key_grad + (start - key_range_.first) * dim_, problem_.scale, batch,
          key_head);
    store(gradients_.value, w.value_grad + (start - value_range_.first) * dim_, 1.0f, batch,
          key_head);
  }
}

void KeyGradients::store_prefix(int64_t group, int64_t key_head, const Workspace& w) const {
  const int64_t batch = problem_.prefix_key.shape[0] == 1 ? 0 : layout_.group(group).first_batch;
  store(gradients_.prefix_key, w.key_grad, problem_.scale, batch, key_head);
  store(gradients_.prefix_value, w.value_grad, 1.0f, batch, key_head);
}

void KeyGradients::store(const Operand& target, const float* sums, float factor, int64_t batch,
                         int64_t key_head) const {
  if (target.data == nullptr) return;
  const int64_t size = problem_.dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t n = 0; n < target.shape[2]; ++n) {
    const int64_t at =
        batch * target.strides[0] + key_head * target.strides[1] + n * target.strides[2];
    kernel_.store_row(problem_.dtype, sums + n * dim_, factor,
                      static_cast<char*>(target.data) + at * size, target.strides[3],
                      problem_.head_dim);
  }
}

}  // namespace dream::cpu
