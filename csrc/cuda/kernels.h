// Every kernel by name, for the table of the host and for nvcc.
#pragma once

#include "combine.h"
#include "forward.h"
#include "keys.h"
#include "plan.h"
#include "rows.h"
#include "scores.h"

namespace dream::cuda {

struct PlanKernel {
  static constexpr int kThreads = kPlanThreads;
  static constexpr int kShared = kPlanShared;
  static DREAM_DEVICE void run(const Parameters& p) { Plan::run(p); }
};

}  // namespace dream::cuda

// X(name, type) for the kernels that do not depend on the dtype.
#define DREAM_COMMON_KERNELS(X)               \
  X(plan, PlanKernel)                         \
  X(scores_reweight, ScoreGradients<false>)   \
  X(scores_bias, ScoreGradients<true>)

// X(name, type) for the kernels of a dtype and head size.
#define DREAM_KERNELS_OF(X, T, t, D)                                      \
  X(forward_reweight_##t##_##D, Forward<T, D, kReweight>)                 \
  X(forward_bias_##t##_##D, Forward<T, D, kBias>)                         \
  X(forward_mass_##t##_##D, Forward<T, D, kMass>)                         \
  X(combine_reweight_##t##_##D, Combine<T, D, kReweight>)                 \
  X(combine_bias_##t##_##D, Combine<T, D, kBias>)                         \
  X(join_reweight_##t##_##D, Join<T, D, kReweight>)                       \
  X(join_bias_##t##_##D, Join<T, D, kBias>)                               \
  X(rows_reweight_##t##_##D, RowGradients<T, D, kReweight, false>)        \
  X(rows_bias_##t##_##D, RowGradients<T, D, kBias, false>)                \
  X(query_reweight_##t##_##D, RowGradients<T, D, kReweight, true>)        \
  X(query_bias_##t##_##D, RowGradients<T, D, kBias, true>)                \
  X(keys_reweight_##t##_##D, KeyGradients<T, D, false>)                   \
  X(keys_bias_##t##_##D, KeyGradients<T, D, true>)
