#pragma once

#include <pybind11/pybind11.h>

namespace dream::cuda {

// Adds the functions of the CUDA implementation to dream_kernels._native.
void define_functions(pybind11::module_& m);

}  // namespace dream::cuda
