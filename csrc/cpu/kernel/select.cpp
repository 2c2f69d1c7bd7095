#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernel.h"

namespace dream::cpu {
namespace {

struct Candidate {
  const Kernel& kernel;
  bool supported;
};

const Kernel& select() {
  const Candidate candidates[] = {
#ifdef DREAM_KERNELS_X86
      {avx512_kernel(), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl")},
      {avx2_kernel(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {portable_kernel(), true},
  };
  const char* wanted = std::getenv("DREAM_KERNELS_CPU_ISA");
  std::string available;
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported) continue;
    if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == candidate.kernel.name) {
      return candidate.kernel;
    }
    available += (available.empty() ? "" : ", ") + std::string(candidate.kernel.name);
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
