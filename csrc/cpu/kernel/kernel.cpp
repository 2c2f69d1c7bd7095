// Compiled once per instruction set, with DREAM_KERNELS_ISA naming it.
#include "kernel.h"

#include "backward.h"
#include "forward.h"
#include "score_gradient.h"

#define DREAM_CONCAT_(a, b) a##b
#define DREAM_CONCAT(a, b) DREAM_CONCAT_(a, b)
#define DREAM_STRING_(a) #a
#define DREAM_STRING(a) DREAM_STRING_(a)

namespace dream::cpu {
namespace {

template <typename Products>
struct RowBlockPasses {
  static void forward(const Problem& problem, const RowBlock& rows, const Operand& output,
                      float* state, void* segment_outputs, Workspace& workspace) {
    Forward<Products>(problem, rows, segment_outputs, workspace).run(output, state);
  }
  static constexpr auto backward = cpu::backward<Products>;
  static constexpr auto scores = backward_of_scores;
  static constexpr auto mass = cpu::mass<Products>;
};

template <typename Products>
constexpr Passes passes() {
  using All = RowBlockPasses<Products>;
  return {All::forward, All::backward, All::scores, All::mass};
}

}  // namespace

const Kernel& DREAM_CONCAT(DREAM_KERNELS_ISA, _kernel)() {
#if defined(__AVX512BF16__)
  constexpr Passes bfloat16 = passes<PairProducts>();
#else
  constexpr Passes bfloat16 = passes<FloatProducts>();
#endif
  static constexpr Kernel kernel{DREAM_STRING(DREAM_KERNELS_ISA), passes<FloatProducts>(),
                                 bfloat16, store_row};
  return kernel;
}

}  // namespace dream::cpu
