#include "binaries.h"

#define DREAM_PARTS(X) X(common) X(bf16_64) X(bf16_128) X(f16_64) X(f16_128)

#if defined(DREAM_KERNELS_CUDA_ARCHS)
#define DREAM_DECLARE(part) \
  extern "C" __attribute__((visibility("hidden"))) const char dream_binary_##part[], \
      dream_binary_##part##_end[];
DREAM_PARTS(DREAM_DECLARE)
#endif

namespace dream::cuda {

#if defined(DREAM_KERNELS_CUDA_ARCHS)

const char* architectures() { return DREAM_KERNELS_CUDA_ARCHS; }
const char* compiler() { return DREAM_KERNELS_NVCC; }

std::string_view binary_of(std::string_view part) {
#define DREAM_RETURN(name)                                                                   \
  if (part == #name) {                                                                       \
    return {dream_binary_##name,                                                             \
            static_cast<size_t>(dream_binary_##name##_end - dream_binary_##name)};           \
  }
  DREAM_PARTS(DREAM_RETURN)
  return {};
}

#else

const char* architectures() { return ""; }
const char* compiler() { return ""; }
std::string_view binary_of(std::string_view) { return {}; }

#endif

}  // namespace dream::cuda
