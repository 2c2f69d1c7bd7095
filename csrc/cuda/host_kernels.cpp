#include "kernels.h"
#include "table.h"

namespace dream::cuda {
namespace {

template <typename K>
void run_on_host(const void* parameters) {
  K::run(*static_cast<const Parameters*>(parameters));
}

template <typename K>
constexpr Kernel describe(const char* name, const char* part) {
  return {name, part, K::kThreads, static_cast<size_t>(K::kShared), &run_on_host<K>};
}

#define DREAM_DESCRIBE_COMMON(name, ...) describe<__VA_ARGS__>("dream_" #name, "common"),

template <typename T, int D>
constexpr int kForwardRows = Forward<T, D, kReweight>::kRows;
template <typename T, int D>
constexpr int kGradientRows = RowGradients<T, D, kReweight, true>::kRows;

#define DREAM_SIZES(T, D) kForwardRows<T, D>, kGradientRows<T, D>, kTileKeys<D>

// In the order of the fields of CommonKernels and Kernels.
#define DREAM_COMMON DREAM_COMMON_KERNELS(DREAM_DESCRIBE_COMMON)
#define DREAM_DESCRIBE(name, ...) describe<__VA_ARGS__>("dream_" #name, "bf16_64"),
const Kernels kBFloat64 = {DREAM_KERNELS_OF(DREAM_DESCRIBE, BFloat, bf16, 64)
                               DREAM_SIZES(BFloat, 64)};
#undef DREAM_DESCRIBE
#define DREAM_DESCRIBE(name, ...) describe<__VA_ARGS__>("dream_" #name, "bf16_128"),
const Kernels kBFloat128 = {DREAM_KERNELS_OF(DREAM_DESCRIBE, BFloat, bf16, 128)
                                DREAM_SIZES(BFloat, 128)};
#undef DREAM_DESCRIBE
#define DREAM_DESCRIBE(name, ...) describe<__VA_ARGS__>("dream_" #name, "f16_64"),
const Kernels kHalf64 = {DREAM_KERNELS_OF(DREAM_DESCRIBE, Half, f16, 64) DREAM_SIZES(Half, 64)};
#undef DREAM_DESCRIBE
#define DREAM_DESCRIBE(name, ...) describe<__VA_ARGS__>("dream_" #name, "f16_128"),
const Kernels kHalf128 = {DREAM_KERNELS_OF(DREAM_DESCRIBE, Half, f16, 128) DREAM_SIZES(Half, 128)};
const CommonKernels kCommon = {DREAM_COMMON};

}  // namespace

const CommonKernels& common_kernels() { return kCommon; }

std::vector<Kernel> all_kernels() {
  std::vector<Kernel> all = {DREAM_COMMON};
  for (const Kernels* k : {&kBFloat64, &kBFloat128, &kHalf64, &kHalf128}) {
    all.insert(all.end(), {k->forward_reweight, k->forward_bias, k->forward_mass,
                           k->combine_reweight, k->combine_bias, k->join_reweight, k->join_bias, k->rows_reweight, k->rows_bias,
                           k->query_reweight, k->query_bias, k->keys_reweight, k->keys_bias});
  }
  return all;
}

const Kernels* kernels_of(DType dtype, int64_t head_dim) {
  if (dtype == DType::kFloat32 || (head_dim != 64 && head_dim != 128)) return nullptr;
  if (dtype == DType::kBFloat16) return head_dim == 64 ? &kBFloat64 : &kBFloat128;
  return head_dim == 64 ? &kHalf64 : &kHalf128;
}

}  // namespace dream::cuda
