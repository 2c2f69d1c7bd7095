// The operator on the CPU: document attention, its gradients, and the masses of the documents.
#pragma once

#include "../problem.h"

namespace dream::cpu {

constexpr int64_t kMaxHeadDim = 256;

// What forward saves for backward: `state` is [B, Hq, M, C + 1] float32, contiguous, the
// log-sum-exp of each row's visible logits in each document and, last, outside all documents, its
// sink included. A plain row keeps all its keys in that last entry.
//
// Results do not depend on `threads`: the partition of the work and the order of every sum are
// fixed by the problem alone.
//
// `segment_outputs` may be null. Otherwise it is [B, Hq, M, (C + 1) D] in the problem's type,
// contiguous, and gets the output of each segment alone for the scored rows, zeros elsewhere: with
// it a backward that wants the scores' gradient only needs no keys.
void forward(const Problem& problem, const Operand& output, float* state, void* segment_outputs,
             int threads);

// `state` and `output` are those of forward.
void backward(const Problem& problem, const float* state, const Operand& output,
              const Operand& grad_output, const Gradients& gradients, int threads);

// The scores' gradient alone, from what forward kept.
void backward_of_scores(const Problem& problem, const float* state, const void* segment_outputs,
                        const Operand& grad_output, const Operand& grad_scores, int threads);

// `mass` is [B, Hq, M, C] float32, contiguous: what plain attention gives to each document.
void document_mass(const Problem& problem, float* mass, int threads);

}  // namespace dream::cpu
