// The kernels as the host knows them: how each is launched, and its build for the host.
#pragma once

#include <cstddef>
#include <vector>

#include "../problem.h"

namespace dream::cuda {

struct Kernel {
  const char* name;  // in the binary for GPUs
  const char* part;  // which of the binaries
  int threads;
  size_t shared_bytes;
  void (*run)(const void* parameters);  // on the host, called by every thread of the emulator
};

struct CommonKernels {
  Kernel plan, scores_reweight, scores_bias;
};

// Of one dtype and head size.
struct Kernels {
  Kernel forward_reweight, forward_bias, forward_mass, combine_reweight, combine_bias;
  Kernel join_reweight, join_bias;
  Kernel rows_reweight, rows_bias, query_reweight, query_bias, keys_reweight, keys_bias;
  int forward_rows;   // of a block of the forward
  int gradient_rows;  // of a block of the backward over rows
  int tile_keys;
};

const CommonKernels& common_kernels();

std::vector<Kernel> all_kernels();

// Null where there are none.
const Kernels* kernels_of(DType dtype, int64_t head_dim);

}  // namespace dream::cuda
