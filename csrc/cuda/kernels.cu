// The kernels as nvcc compiles them, those of one dtype and head size at a time: DREAM_PART is
// common, bf16_64, bf16_128, f16_64 or f16_128.
#include "kernels.h"

namespace dream::cuda {

#define DREAM_ENTRY(name, ...)                                                             \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads)                      \
      dream_##name(const __grid_constant__ Parameters p) {                                 \
    __VA_ARGS__::run(p);                                                                   \
  }

#define DREAM_PART_common DREAM_COMMON_KERNELS(DREAM_ENTRY)
#define DREAM_PART_bf16_64 DREAM_KERNELS_OF(DREAM_ENTRY, BFloat, bf16, 64)
#define DREAM_PART_bf16_128 DREAM_KERNELS_OF(DREAM_ENTRY, BFloat, bf16, 128)
#define DREAM_PART_f16_64 DREAM_KERNELS_OF(DREAM_ENTRY, Half, f16, 64)
#define DREAM_PART_f16_128 DREAM_KERNELS_OF(DREAM_ENTRY, Half, f16, 128)
#define DREAM_JOIN(a, b) a##b
#define DREAM_ENTRIES(part) DREAM_JOIN(DREAM_PART_, part)

DREAM_ENTRIES(DREAM_PART)

}  // namespace dream::cuda
