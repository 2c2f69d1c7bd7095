// The kernels compiled for GPUs, if nvcc was there when the extension was built.
#pragma once

#include <string_view>

namespace dream::cuda {

// Compute capabilities that they were compiled for, such as "80 90"; empty: for none.
const char* architectures();

// The version of nvcc that did; empty if none did.
const char* compiler();

// The binary with the kernels of a part, "common" or a dtype and head size like "bf16_64"; empty
// where there is none.
std::string_view binary_of(std::string_view part);

}  // namespace dream::cuda
