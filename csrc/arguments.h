// What Python hands to the native implementations, checked: a wrong call raises ValueError, and never
// accesses an element outside the given memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "problem.h"

namespace dream {

using Shape = std::vector<int64_t>;
// Address, shape, strides in elements, address of the memory that holds the tensor, its size in bytes.
using Array = std::tuple<uintptr_t, Shape, Shape, uintptr_t, uint64_t>;

std::string to_string(const Shape& shape);

[[noreturn]] void fail(const std::string& message);

// Checks what holds for every tensor, whatever its shape should be.
Operand to_operand(const char* name, const Array& array, size_t dimensions, size_t element_size);

Operand checked(const char* name, const Array& array, const Shape& expected, size_t element_size);

// A tensor that is written: it must not overlap itself.
Operand checked_output(const char* name, const Array& array, const Shape& expected,
                       size_t element_size);

Operand checked_contiguous(const char* name, const Array& array, const Shape& expected,
                           size_t element_size = sizeof(float));

size_t element_size(const Problem& p);

Shape shape_of(const Operand& operand, size_t dimensions);

Problem make_problem(const std::string& dtype, const Array& query, const Array& key,
                     const Array& value, const std::optional<Array>& prefix_key,
                     const std::optional<Array>& prefix_value, const Array& scores,
                     const Array& spans, const std::optional<Array>& mask,
                     const std::optional<Array>& positions, const std::optional<Array>& sinks,
                     const Array& heads, const std::string& mode,
                     std::optional<float> document_mass, float scale, bool causal,
                     std::optional<int64_t> window, std::optional<double> softcap);

struct GradientArrays {
  const std::optional<Array>&query, &key, &value, &scores, &prefix_key, &prefix_value, &sinks;
};

// Gradients to compute, each with the shape of its tensor; `prefix_size` is the size of an element
// of the prefix's.
Gradients checked_gradients(const Problem& p, const GradientArrays& arrays, size_t prefix_size);

}  // namespace dream
