// Compiled once per instruction set, with DREAM_KERNELS_ISA naming it.
#include "kernel.h"

#include "backward.h"
#include "forward.h"

#define DREAM_CONCAT_(a, b) a##b
#define DREAM_CONCAT(a, b) DREAM_CONCAT_(a, b)
#define DREAM_STRING_(a) #a
#define DREAM_STRING(a) DREAM_STRING_(a)

namespace dream::cpu {

const Kernel& DREAM_CONCAT(DREAM_KERNELS_ISA, _kernel)() {
  static constexpr Kernel kernel{DREAM_STRING(DREAM_KERNELS_ISA), forward, backward, mass,
                                 store_row};
  return kernel;
}

}  // namespace dream::cpu
