#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernel.h"

namespace dream::cpu {
namespace {

#if defined(DREAM_KERNELS_HAS_avx512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Candidate {
  const Kernel& (*kernel)();
  bool supported;
};

const Kernel& select() {
  // setup.py defines which of them the compiler could make.
  const Candidate candidates[] = {
#if defined(DREAM_KERNELS_HAS_avx512)
#if defined(DREAM_KERNELS_HAS_avx512_bf16)
      {avx512_bf16_kernel, has_avx512() && __builtin_cpu_supports("avx512bf16")},
#endif
      {avx512_kernel, has_avx512()},
#endif
#if defined(DREAM_KERNELS_HAS_avx2)
      {avx2_kernel, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {portable_kernel, true},
  };
  const char* wanted = std::getenv("DREAM_KERNELS_CPU_ISA");
  std::string available;
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported) continue;
    const Kernel& kernel = candidate.kernel();
    if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == kernel.name) return kernel;
    available += (available.empty() ? "" : ", ") + std::string(kernel.name);
  }
  throw std::invalid_argument("DREAM_KERNELS_CPU_ISA must be one of " + available +
                              " on this machine, got \"" + wanted + "\"");
}

}  // namespace

const Kernel& selected_kernel() {
  static const Kernel& kernel = select();
  return kernel;
}

}  // namespace dream::cpu
