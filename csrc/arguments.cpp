#include "arguments.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <utility>

#include "cpu/attention.h"

namespace dream {
namespace {

// Batch elements, heads, rows and positions are counted in 32 bits inside the kernel.
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();

// Raises unless every element lies in the memory [memory, memory + bytes).
void check_memory(const char* name, const Array& array, size_t element_size) {
  const auto& [address, shape, strides, memory, bytes] = array;
  const auto outside = [&, name = name] {
    fail(std::string(name) + " must lie in its memory of " + std::to_string(std::get<4>(array)) +
         " bytes, got shape " + to_string(std::get<1>(array)) + " and strides " +
         to_string(std::get<2>(array)) + " from byte " +
         std::to_string(static_cast<int64_t>(std::get<0>(array) - std::get<3>(array))) + " on");
  };
  if (address == 0 || address % element_size != 0) {
    fail(std::string(name) + " must have a non-null, aligned address, got " +
         std::to_string(address));
  }
  // Offsets of the first and the last element in memory, in elements.
  int64_t first = 0, last = 0;
  for (size_t i = 0; i < shape.size(); ++i) {
    int64_t extent;
    int64_t& side = strides[i] < 0 ? first : last;
    if (__builtin_mul_overflow(shape[i] - 1, strides[i], &extent) ||
        __builtin_add_overflow(side, extent, &side)) {
      outside();
    }
  }
  const auto size = static_cast<int64_t>(element_size);
  int64_t begin, end;
  if (__builtin_add_overflow(last, 1, &end) || __builtin_mul_overflow(first, size, &begin) ||
      __builtin_mul_overflow(end, size, &end)) {
    outside();
  }
  if (address < memory || memory + bytes < memory) outside();
  const uint64_t before = address - memory;
  if (before > bytes || 0 - static_cast<uint64_t>(begin) > before ||
      static_cast<uint64_t>(end) > bytes - before) {
    outside();
  }
}

DType parse_dtype(const std::string& dtype) {
  if (dtype == "float32") return DType::kFloat32;
  if (dtype == "bfloat16") return DType::kBFloat16;
  if (dtype == "float16") return DType::kFloat16;
  fail("dtype must be float32, bfloat16 or float16, got " + dtype);
}

Mode parse_mode(const std::string& mode) {
  if (mode == "reweight") return Mode::kReweight;
  if (mode == "bias") return Mode::kBias;
  fail("mode must be reweight or bias, got " + mode);
}

}  // namespace

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void fail(const std::string& message) { throw std::invalid_argument(message); }

// Checks what holds for every tensor, whatever its shape should be.
Operand to_operand(const char* name, const Array& array, size_t dimensions, size_t element_size) {
  const Shape &shape = std::get<1>(array), &strides = std::get<2>(array);
  if (shape.size() != dimensions || strides.size() != dimensions) {
    fail(std::string(name) + " must have " + std::to_string(dimensions) +
         " dimensions, got shape " + to_string(shape) + " and strides " + to_string(strides));
  }
  Operand operand{};
  bool empty = false;
  for (size_t i = 0; i < dimensions; ++i) {
    if (shape[i] < 0) fail(std::string(name) + " has a negative size: " + to_string(shape));
    if (shape[i] > kMaxSize) {
      fail(std::string(name) + " has a size of more than 2^31 - 1: " + to_string(shape));
    }
    empty |= shape[i] == 0;
    operand.shape[i] = shape[i];
    operand.strides[i] = strides[i];
  }
  if (!empty) check_memory(name, array, element_size);
  operand.data = reinterpret_cast<void*>(std::get<0>(array));
  return operand;
}

Operand checked(const char* name, const Array& array, const Shape& expected, size_t element_size) {
  if (std::get<1>(array) != expected) {
    fail(std::string(name) + " must have shape " + to_string(expected) + ", got " +
         to_string(std::get<1>(array)));
  }
  return to_operand(name, array, expected.size(), element_size);
}

// A tensor that is written must not overlap itself: in the order of their strides, each dimension
// steps over all that the ones before it span.
Operand checked_output(const char* name, const Array& array, const Shape& expected,
                       size_t element_size) {
  const Operand operand = checked(name, array, expected, element_size);
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride and size
  for (size_t i = 0; i < expected.size(); ++i) {
    if (expected[i] == 0) return operand;
    if (expected[i] > 1) steps.emplace_back(std::abs(operand.strides[i]), expected[i]);
  }
  std::sort(steps.begin(), steps.end());
  int64_t spanned = 1;  // all of it lies in memory, so none of this overflows
  for (const auto& [stride, size] : steps) {
    if (stride < spanned) {
      fail(std::string(name) + " is written and must not overlap itself, got shape " +
           to_string(expected) + " and strides " + to_string(std::get<2>(array)));
    }
    spanned += stride * (size - 1);
  }
  return operand;
}

Operand checked_contiguous(const char* name, const Array& array, const Shape& expected,
                           size_t element_size) {
  const Operand operand = checked_output(name, array, expected, element_size);
  int64_t stride = 1;
  for (size_t i = expected.size(); i-- > 0;) {
    if (expected[i] == 0) return operand;
    if (expected[i] == 1) continue;
    if (operand.strides[i] != stride) {
      fail(std::string(name) + " must be contiguous, got strides " +
           to_string(std::get<2>(array)));
    }
    stride *= expected[i];
  }
  return operand;
}

size_t element_size(const Problem& p) { return p.dtype == DType::kFloat32 ? 4 : 2; }

namespace {

// A prefix [1 or B, Hkv, P, D]; one that the batch shares gets a batch stride of 0.
Operand checked_prefix(const char* name, const Array& array, const Problem& p, int64_t batch) {
  Operand operand = checked(name, array, {batch, p.key_heads, p.prefix_length, p.head_dim},
                            element_size(p));
  if (batch == 1) operand.strides[0] = 0;
  return operand;
}

}  // namespace

Problem make_problem(const std::string& dtype, const Array& query, const Array& key,
                     const Array& value, const std::optional<Array>& prefix_key,
                     const std::optional<Array>& prefix_value, const Array& scores,
                     const Array& spans, const std::optional<Array>& mask,
                     const std::optional<Array>& positions, const std::optional<Array>& sinks,
                     const Array& heads, const std::string& mode,
                     std::optional<float> document_mass, float scale, bool causal,
                     std::optional<int64_t> window, std::optional<double> softcap) {
  Problem p{};
  p.dtype = parse_dtype(dtype);
  p.mode = parse_mode(mode);
  p.query = to_operand("query", query, 4, element_size(p));
  p.key = to_operand("key", key, 4, element_size(p));
  p.batch = p.query.shape[0];
  p.query_heads = p.query.shape[1];
  p.rows = p.query.shape[2];
  p.head_dim = p.query.shape[3];
  p.key_heads = p.key.shape[1];
  p.local_length = p.key.shape[2];
  if (p.batch < 1 || p.query_heads < 1 || p.rows < 1 || p.head_dim < 1) {
    fail("query must have no empty dimension, got " + to_string(std::get<1>(query)));
  }
  if (p.head_dim > cpu::kMaxHeadDim) {
    fail("query must have a head size of at most " + std::to_string(cpu::kMaxHeadDim) + ", got " +
         std::to_string(p.head_dim));
  }
  if (p.key_heads < 1 || p.query_heads % p.key_heads != 0) {
    fail("key must have a number of heads that divides query's " + std::to_string(p.query_heads) +
         ", got " + std::to_string(p.key_heads));
  }
  const Shape local{p.batch, p.key_heads, p.local_length, p.head_dim};
  checked("key", key, local, element_size(p));
  p.value = checked("value", value, local, element_size(p));

  if (prefix_key.has_value() != prefix_value.has_value()) {
    fail("prefix_key and prefix_value must both be given or both be None");
  }
  if (prefix_key) {
    const Operand operand = to_operand("prefix_key", *prefix_key, 4, element_size(p));
    p.prefix_length = operand.shape[2];
    const int64_t batch = operand.shape[0];
    if (batch != 1 && batch != p.batch) {
      fail("prefix_key must have batch 1 or " + std::to_string(p.batch) + ", got " +
           std::to_string(batch));
    }
    p.prefix_key = checked_prefix("prefix_key", *prefix_key, p, batch);
    p.prefix_value = checked_prefix("prefix_value", *prefix_value, p, batch);
  }
  const int64_t length = p.prefix_length + p.local_length;
  if (length > kMaxSize) {
    fail("key must have, with its prefix, at most 2^31 - 1 keys, got " + std::to_string(length));
  }

  p.spans = to_operand("spans", spans, 3, sizeof(int64_t));
  p.documents = p.spans.shape[1];
  if (p.documents < 1) fail("spans must name at least one document");
  checked("spans", spans, {p.batch, p.documents, 2}, sizeof(int64_t));
  p.scores = to_operand("scores", scores, 3, sizeof(float));
  const int64_t score_heads = p.scores.shape[1] == 1 ? 1 : p.query_heads;
  checked("scores", scores, {p.batch, score_heads, p.documents}, sizeof(float));
  if (mask) p.mask = checked("mask", *mask, {p.batch, length}, 1);
  if (positions) {
    if (!window) fail("positions need a window");
    p.positions = checked("positions", *positions, {p.batch, length}, sizeof(int64_t));
  }
  if (sinks) p.sinks = checked("sinks", *sinks, {p.query_heads}, sizeof(float));
  p.heads = checked("heads", heads, {p.query_heads}, 1);

  p.fixed_mass = document_mass.has_value();
  p.document_mass = document_mass.value_or(0.0f);
  if (p.fixed_mass && p.mode != Mode::kReweight) fail("document_mass needs mode reweight");
  if (p.fixed_mass && !(p.document_mass > 0.0f && p.document_mass <= 1.0f)) {
    fail("document_mass must lie in (0, 1], got " + std::to_string(p.document_mass));
  }
  if (!std::isfinite(scale)) fail("scale must be finite, got " + std::to_string(scale));
  p.scale = scale;
  p.causal = causal;
  if (window && *window < 1) fail("window must be at least 1, got " + std::to_string(*window));
  if (window && !causal) fail("window needs causal");
  p.window = window.value_or(0);
  if (softcap && !(*softcap > 0.0 && std::isfinite(*softcap))) {
    fail("softcap must be positive and finite, got " + std::to_string(*softcap));
  }
  // A lower cap leaves nothing of a logit and a higher one all of it; these have an inverse.
  if (softcap) p.softcap = static_cast<float>(std::clamp(*softcap, 1e-30, 1e30));
  return p;
}

Shape shape_of(const Operand& operand, size_t dimensions) {
  return Shape(operand.shape, operand.shape + dimensions);
}

Gradients checked_gradients(const Problem& p, const GradientArrays& arrays, size_t prefix_size) {
  const auto wanted = [&](const char* name, const std::optional<Array>& array, const Operand& like,
                          size_t dimensions, size_t size) {
    if (!array) return Operand{};
    if (like.data == nullptr && dimensions == 4 && like.shape[3] == 0) {
      fail(std::string(name) + " was asked for, but the problem has no prefix");
    }
    return checked_output(name, *array, shape_of(like, dimensions), size);
  };
  Gradients gradients{};
  gradients.query = wanted("grad_query", arrays.query, p.query, 4, element_size(p));
  gradients.key = wanted("grad_key", arrays.key, p.key, 4, element_size(p));
  gradients.value = wanted("grad_value", arrays.value, p.value, 4, element_size(p));
  gradients.scores = wanted("grad_scores", arrays.scores, p.scores, 3, sizeof(float));
  gradients.prefix_key = wanted("grad_prefix_key", arrays.prefix_key, p.prefix_key, 4, prefix_size);
  gradients.prefix_value =
      wanted("grad_prefix_value", arrays.prefix_value, p.prefix_value, 4, prefix_size);
  if (arrays.sinks && p.sinks.data == nullptr) {
    fail("grad_sinks was asked for, but the problem has no sinks");
  }
  gradients.sinks = wanted("grad_sinks", arrays.sinks, p.sinks, 1, sizeof(float));
  return gradients;
}

}  // namespace dream
