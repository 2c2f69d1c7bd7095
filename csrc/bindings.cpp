// The Python module dream_kernels._native. Tensors come as (address, shape, strides in elements,
// address of the memory that holds them, its size in bytes); everything is checked here, so that a
// wrong call raises ValueError and never accesses an element outside the given memory.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <thread>

#include "arguments.h"
#include "cpu/attention.h"
#include "cpu/buffer.h"
#include "cpu/kernel/kernel.h"
#include "cuda/bindings.h"
#include "problem.h"

namespace py = pybind11;

namespace dream {
namespace {

// A team of more threads than the machine runs gains nothing, and where the system refuses them the
// OpenMP runtime ends the process. A few more are allowed, to test that their number changes nothing.
int most_threads() {
  return std::max(16, static_cast<int>(std::thread::hardware_concurrency()));
}

int checked_threads(int threads) {
  if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
  return std::min(threads, most_threads());
}

Shape state_shape(const Problem& p) {
  return {p.batch, p.query_heads, p.rows, p.documents + 1};
}

Operand checked_segment_outputs(const Problem& p, const Array& array) {
  const Shape shape{p.batch, p.query_heads, p.rows, (p.documents + 1) * p.head_dim};
  return checked_contiguous("segment_outputs", array, shape, element_size(p));
}

void forward(const Problem& p, const Array& output, const Array& state,
             const std::optional<Array>& segment_outputs, int threads) {
  const Operand out =
      checked_output("output", output, shape_of(p.query, 4), element_size(p));
  const Operand saved = checked_contiguous("state", state, state_shape(p));
  void* kept = segment_outputs ? checked_segment_outputs(p, *segment_outputs).data : nullptr;
  threads = checked_threads(threads);
  const py::gil_scoped_release release;
  cpu::forward(p, out, static_cast<float*>(saved.data), kept, threads);
}

void backward_of_scores(const Problem& p, const Array& state, const Array& segment_outputs,
                        const Array& grad_output, const Array& scores, int threads) {
  const Operand saved = checked_contiguous("state", state, state_shape(p));
  const Operand kept = checked_segment_outputs(p, segment_outputs);
  const Operand grad = checked("grad_output", grad_output, shape_of(p.query, 4), element_size(p));
  const Operand target =
      checked_output("grad_scores", scores, shape_of(p.scores, 3), sizeof(float));
  threads = checked_threads(threads);
  const py::gil_scoped_release release;
  cpu::backward_of_scores(p, static_cast<const float*>(saved.data), kept.data, grad, target,
                          threads);
}

void backward(const Problem& p, const Array& state, const Array& output, const Array& grad_output,
              const std::optional<Array>& query, const std::optional<Array>& key,
              const std::optional<Array>& value, const std::optional<Array>& scores,
              const std::optional<Array>& prefix_key, const std::optional<Array>& prefix_value,
              const std::optional<Array>& sinks, int threads) {
  const Operand saved = checked_contiguous("state", state, state_shape(p));
  const Operand out = checked("output", output, shape_of(p.query, 4), element_size(p));
  const Operand grad = checked("grad_output", grad_output, shape_of(p.query, 4), element_size(p));
  threads = checked_threads(threads);
  const Gradients gradients =
      checked_gradients(p, {query, key, value, scores, prefix_key, prefix_value, sinks},
                        element_size(p));
  const py::gil_scoped_release release;
  cpu::backward(p, static_cast<const float*>(saved.data), out, grad, gradients, threads);
}

void document_mass(const Problem& p, const Array& mass, int threads) {
  const Operand out = checked_contiguous(
      "mass", mass, {p.batch, p.query_heads, p.rows, p.documents});
  threads = checked_threads(threads);
  const py::gil_scoped_release release;
  cpu::document_mass(p, static_cast<float*>(out.data), threads);
}

}  // namespace
}  // namespace dream

PYBIND11_MODULE(_native, m) {
  using namespace dream;
  m.doc() = "Native implementations of dream_kernels. Internal: use dream_kernels.";
  py::class_<Problem>(m, "Problem")
      .def(py::init(&make_problem), py::kw_only(), py::arg("dtype"), py::arg("query"),
           py::arg("key"), py::arg("value"), py::arg("prefix_key"), py::arg("prefix_value"),
           py::arg("scores"), py::arg("spans"), py::arg("mask"), py::arg("positions"),
           py::arg("sinks"), py::arg("heads"), py::arg("mode"), py::arg("document_mass"),
           py::arg("scale"), py::arg("causal"), py::arg("window"), py::arg("softcap"));
  m.def("forward", &forward, py::arg("problem"), py::kw_only(), py::arg("output"),
        py::arg("state"), py::arg("segment_outputs"), py::arg("threads"));
  m.def("backward", &backward, py::arg("problem"), py::kw_only(), py::arg("state"),
        py::arg("output"), py::arg("grad_output"), py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("scores"), py::arg("prefix_key"), py::arg("prefix_value"), py::arg("sinks"),
        py::arg("threads"));
  m.def("backward_of_scores", &backward_of_scores, py::arg("problem"), py::kw_only(),
        py::arg("state"), py::arg("segment_outputs"), py::arg("grad_output"), py::arg("scores"),
        py::arg("threads"));
  m.def("document_mass", &document_mass, py::arg("problem"), py::kw_only(), py::arg("mass"),
        py::arg("threads"));
  m.def("instruction_set", [] { return cpu::selected_kernel().name; },
        "The instruction set in use: portable, avx2, avx512 or avx512_bf16.");
  m.def("take_peak_scratch_bytes", &cpu::take_peak_scratch_bytes,
        "The most bytes of scratch memory in use at once since the last call of this function.");
  m.attr("max_head_dim") = cpu::kMaxHeadDim;
  cuda::define_functions(m);
}
