// A small call of every CUDA kernel in the emulator under ThreadSanitizer, to which each thread of a
// block is a thread and each barrier orders them: a missing barrier is a data race.
//
// Without arguments it prints the barriers that were reached, one a line. With the file and line of
// one, that barrier does nothing. ThreadSanitizer ends the process with status 66.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../csrc/cuda/attention.h"
#include "../../csrc/float_types.h"

namespace {

using dream::Operand;

constexpr int64_t kBatch = 1, kHeads = 2, kKeyHeads = 1, kRows = 20, kLocal = 100, kPrefix = 270;
constexpr int64_t kLength = kPrefix + kLocal, kDim = 64;

uint32_t random_state = 1;

float random_number() {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<float>(random_state >> 8) / (1 << 23) - 1.0f;
}

// Memory that lives as long as the program.
template <typename T>
T* memory(int64_t count) {
  return static_cast<T*>(std::aligned_alloc(256, (count * sizeof(T) + 255) / 256 * 256));
}

Operand tensor(int64_t b, int64_t h, int64_t m, int64_t d) {
  auto* data = memory<uint16_t>(b * h * m * d);
  for (int64_t i = 0; i < b * h * m * d; ++i) data[i] = dream::BFloat16::from_float(random_number());
  return {data, {b, h, m, d}, {h * m * d, m * d, d, 1}};
}

dream::cuda::Workspace workspace(int64_t bytes) { return {memory<char>(bytes), bytes}; }

bool finite(const Operand& x) {
  const auto* data = static_cast<const uint16_t*>(x.data);
  for (int64_t i = 0; i < x.shape[0] * x.strides[0]; ++i) {
    if (!std::isfinite(dream::BFloat16::to_float(data[i]))) return false;
  }
  return true;
}

struct Case {
  dream::Problem p{};
  std::vector<int64_t> spans;
  std::vector<float> scores;
  std::vector<uint8_t> heads = {0, 1};

  explicit Case(dream::Mode mode) {
    // A tile, several tiles, and the last one in another warp of the plan than the first.
    for (int64_t i = 0; i < 33; ++i) spans.insert(spans.end(), {0, 0});
    spans.insert(spans.end(), {260, 362});
    spans[0] = 1;
    spans[1] = 2;
    spans[2] = 4;
    spans[3] = 90;
    const auto documents = static_cast<int64_t>(spans.size() / 2);
    for (int64_t d = 0; d < documents; ++d) scores.push_back(random_number());
    p.batch = kBatch;
    p.query_heads = kHeads;
    p.key_heads = kKeyHeads;
    p.rows = kRows;
    p.head_dim = kDim;
    p.prefix_length = kPrefix;
    p.local_length = kLocal;
    p.documents = documents;
    p.dtype = dream::DType::kBFloat16;
    p.query = tensor(kBatch, kHeads, kRows, kDim);
    p.key = tensor(kBatch, kKeyHeads, kLocal, kDim);
    p.value = tensor(kBatch, kKeyHeads, kLocal, kDim);
    p.prefix_key = tensor(1, kKeyHeads, kPrefix, kDim);
    p.prefix_value = tensor(1, kKeyHeads, kPrefix, kDim);
    p.scores = {scores.data(), {kBatch, 1, documents}, {documents, documents, 1}};
    p.spans = {spans.data(), {kBatch, documents, 2}, {2 * documents, 2, 1}};
    p.heads = {heads.data(), {kHeads}, {1}};
    p.mode = mode;
    p.scale = 0.125f;
    p.causal = true;
  }

  bool run(int splits) {
    using namespace dream::cuda;
    const int64_t slots = state_slots(p), numbers = kBatch * kHeads * kRows * slots;
    ForwardCall forward_call{};
    forward_call.output = tensor(kBatch, kHeads, kRows, kDim);
    forward_call.state = memory<float>(numbers);
    forward_call.plan = workspace(plan_bytes(p));
    forward_call.partial = workspace(partial_bytes(p, splits));
    forward_call.splits = splits;
    const Workspace state{forward_call.state, numbers * int64_t{4}};
    HostLauncher launcher(p);
    launcher.allow(forward_call.output, 4, 2, true);
    launcher.allow(state, false);
    launcher.allow(forward_call.plan, false);
    launcher.allow(forward_call.partial, false);
    forward(p, forward_call, launcher);

    BackwardCall call{};
    call.output = forward_call.output;
    call.grad_output = tensor(kBatch, kHeads, kRows, kDim);
    call.state = forward_call.state;
    call.plan = forward_call.plan;
    call.memory = workspace(backward_bytes(p, splits));
    call.splits = splits;
    dream::Gradients& g = call.gradients;
    g.query = tensor(kBatch, kHeads, kRows, kDim);
    g.key = tensor(kBatch, kKeyHeads, kLocal, kDim);
    g.value = tensor(kBatch, kKeyHeads, kLocal, kDim);
    g.prefix_key = tensor(1, kKeyHeads, kPrefix, kDim);
    g.prefix_value = tensor(1, kKeyHeads, kPrefix, kDim);
    g.scores = p.scores;
    g.scores.data = memory<float>(p.documents);
    launcher.allow(call.grad_output, 4, 2, false);
    launcher.allow(call.memory, false);
    for (const Operand* x : {&g.query, &g.key, &g.value, &g.prefix_key, &g.prefix_value}) {
      launcher.allow(*x, 4, 2, true);
    }
    launcher.allow(g.scores, 3, 4, true);
    backward(p, call, launcher);
    return finite(call.output) && finite(g.query) && finite(g.key) && finite(g.prefix_value);
  }
};

}  // namespace

int main(int count, char** arguments) {
  using namespace dream::cuda;
  if (count == 3) emulator::settings() = {false, arguments[1], std::atoi(arguments[2])};
  bool good = true;
  for (const auto mode : {dream::Mode::kReweight, dream::Mode::kBias}) {
    Case made(mode);
    good &= made.run(mode == dream::Mode::kBias ? 1 : 3);
  }
  for (const auto& [file, line] : emulator::take_barriers()) {
    std::printf("%s %d\n", file, line);
  }
  return good ? 0 : 1;
}
