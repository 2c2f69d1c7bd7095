// The functions that are compiled once per instruction set.
#pragma once

#include "../../problem.h"
#include "../layout.h"
#include "../workspace.h"

namespace dream::cpu {

// Each of these works on one row block.
struct Passes {
  void (*forward)(const Problem& problem, const RowBlock& rows, const Operand& output,
                  float* state, void* segment_outputs, Workspace& workspace);

  // Writes the query's gradient, adds to the workspace's key and value gradients, and writes the
  // sums of the scores' gradient to `score_sums` [targets, C] and what each row adds to that of its
  // sink to `sink_gradients` [B, Hq, M], as far as they are wanted.
  void (*backward)(const Problem& problem, const RowBlock& rows, const float* state,
                   const Operand& output, const Operand& grad_output, const Operand& grad_query,
                   float* score_sums, float* sink_gradients, Workspace& workspace);

  // Writes the sums of the scores' gradient, from the outputs that forward kept.
  void (*scores)(const Problem& problem, const RowBlock& rows, const float* state,
                 const void* segment_outputs, const Operand& grad_output, float* score_sums,
                 Workspace& workspace);

  void (*mass)(const Problem& problem, const RowBlock& rows, float* mass, Workspace& workspace);
};

struct Kernel {
  const char* name;
  Passes general;
  Passes bfloat16;

  // Writes `n` floats, times `factor`, in the caller's type.
  void (*store_row)(DType dtype, const float* source, float factor, void* target, int64_t stride,
                    int64_t n);

  const Passes& passes(DType dtype) const {
    return dtype == DType::kBFloat16 ? bfloat16 : general;
  }
};

const Kernel& portable_kernel();
const Kernel& avx2_kernel();
const Kernel& avx512_kernel();
const Kernel& avx512_bf16_kernel();

// The kernel of this process: the best that was compiled and that the machine can run, or the one
// that the environment variable DREAM_KERNELS_CPU_ISA (portable, avx2, avx512, avx512_bf16) names.
// Throws std::invalid_argument when that is unknown or not available here.
const Kernel& selected_kernel();

}  // namespace dream::cpu
