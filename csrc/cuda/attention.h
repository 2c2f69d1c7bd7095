// One call of the operator: which kernels run, on which grids, over which memory.
#pragma once

#include <cstdint>
#include <vector>

#include "../problem.h"
#include "emulator.h"
#include "parameters.h"
#include "table.h"

namespace dream::cuda {

// Memory that a call works in, on the device of its tensors.
struct Workspace {
  void* data;
  int64_t bytes;
};

// Where kernels run.
class Launcher {
 public:
  virtual ~Launcher() = default;
  virtual void launch(const Kernel& kernel, const int (&grid)[3], const Parameters& parameters) = 0;
};

// In the emulator, which checks every access against the operands of the call.
class HostLauncher : public Launcher {
 public:
  explicit HostLauncher(const Problem& problem);
  void launch(const Kernel& kernel, const int (&grid)[3], const Parameters& parameters) override;
  void allow(const Operand& operand, int dimensions, int64_t element_size, bool writable);
  // A workspace, which begins as NaN; what an earlier call filled is only read.
  void allow(const Workspace& workspace, bool filled);

 private:
  std::vector<emulator::Range> memory_;
};

// Log-sum-exps of a row that are kept, [B, Hq, slots, M] in float32.
int64_t state_slots(const Problem& problem);

int64_t plan_bytes(const Problem& problem);
int64_t partial_bytes(const Problem& problem, int splits);
int64_t backward_bytes(const Problem& problem, int splits);

struct ForwardCall {
  Operand output;  // [B, Hq, M, D], the last stride 1
  float* state;
  Workspace plan;
  Workspace partial;  // empty unless splits > 1
  int splits;
};

// Writes the output, the state and the plan.
void forward(const Problem& problem, const ForwardCall& call, Launcher& launcher);

struct BackwardCall {
  Operand output, grad_output;
  float* state;
  Workspace plan;  // of the forward
  Workspace memory;
  int splits;
  // Where the batch shares the prefix, its gradients are sums in float32, [1, Hkv, P, D] of zeros.
  Gradients gradients;
};

void backward(const Problem& problem, const BackwardCall& call, Launcher& launcher);

// The log-sum-exps of plain attention to each segment: what forward leaves in the state of scored
// rows, here of all rows, in [B, Hq, C + 3, M].
void masses(const Problem& problem, float* state, const Workspace& plan, Launcher& launcher);

}  // namespace dream::cuda
