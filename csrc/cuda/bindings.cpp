#include "bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>

#include "../arguments.h"
#include "attention.h"
#include "binaries.h"
#include "driver.h"

namespace py = pybind11;

namespace dream::cuda {
namespace {

using Stream = std::optional<uintptr_t>;

Problem checked_problem(const Problem& p) {
  if (kernels_of(p.dtype, p.head_dim) == nullptr) {
    fail("query must be float16 or bfloat16 with a head size of 64 or 128");
  }
  if (p.query_heads > kMaxHeads) {
    fail("query must have at most " + std::to_string(kMaxHeads) + " heads, got " +
         std::to_string(p.query_heads));
  }
  if (p.window > 0 || p.softcap > 0.0f || p.sinks.data != nullptr) {
    fail("window, softcap and sinks must be None");
  }
  return p;
}

// Copies are of 16 bytes.
bool has_rows(const Operand& operand) {
  if (operand.data == nullptr) return true;
  bool good = reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
  for (int i = 0; i < 4; ++i) {
    const int64_t stride = operand.strides[i];
    if (operand.shape[i] == 0) return true;
    if (operand.shape[i] == 1) continue;
    good &= i < 3 ? stride % 8 == 0 && stride >= 0 : stride == 1;
    good &= i != 2 || stride <= INT32_MAX;
  }
  return good;
}

void check_rows(const char* name, const Operand& operand) {
  if (has_rows(operand)) return;
  fail(std::string(name) + " must be aligned to 16 bytes, with a last stride of 1 and others that "
                           "are multiples of 8, that of rows below 2^31");
}

bool is_contiguous(const Operand& operand, int dimensions) {
  int64_t expected = 1;
  for (int i = dimensions - 1; i >= 0; expected *= operand.shape[i--]) {
    if (operand.shape[i] > 1 && operand.strides[i] != expected) return false;
  }
  return true;
}

// Whether the kernels read each input where it is.
bool readable(const Problem& p) {
  for (const Operand* x : {&p.query, &p.key, &p.value, &p.prefix_key, &p.prefix_value}) {
    if (!has_rows(*x)) return false;
  }
  return is_contiguous(p.spans, 3) && is_contiguous(p.mask, 2);
}

void check_inputs(const Problem& p) {
  check_rows("query", p.query);
  check_rows("key", p.key);
  check_rows("value", p.value);
  check_rows("prefix_key", p.prefix_key);
  check_rows("prefix_value", p.prefix_value);
  if (!readable(p)) fail("spans and mask must be contiguous");
}

void check_splits(int splits) {
  if (splits < 1) fail("splits must be at least 1, got " + std::to_string(splits));
}

Operand checked_rows(const char* name, const Array& array, const Problem& p) {
  const Operand operand = checked_output(name, array, shape_of(p.query, 4), 2);
  check_rows(name, operand);
  return operand;
}

Workspace checked_workspace(const char* name, const Array& array, int64_t bytes) {
  const Shape& shape = std::get<1>(array);
  if (shape.size() != 1 || shape[0] < bytes) {
    fail(std::string(name) + " must be " + std::to_string(bytes) + " bytes or more, got shape " +
         to_string(shape));
  }
  return {checked_contiguous(name, array, shape, 1).data, shape[0]};
}

float* checked_state(const Problem& p, const Array& array, int64_t slots) {
  return static_cast<float*>(
      checked_contiguous("state", array, {p.batch, p.query_heads, slots, p.rows}).data);
}

Workspace state_memory(const Problem& p, float* state, int64_t slots) {
  return {state, p.batch * p.query_heads * slots * p.rows * int64_t{4}};
}

// Calls run(launcher): the emulator's, where allow(emulated) adds what else may be accessed, or the
// current device's.
template <typename Allow, typename Run>
void run_on(const Problem& p, const Stream& stream, Allow allow, Run run) {
  const py::gil_scoped_release release;
  if (stream) {
    DeviceLauncher launcher(reinterpret_cast<void*>(*stream));
    run(launcher);
  } else {
    HostLauncher launcher(p);
    allow(launcher);
    run(launcher);
  }
}

py::tuple sizes(const Problem& given, int splits) {
  const Problem p = checked_problem(given);
  return py::make_tuple(plan_bytes(p), partial_bytes(p, splits), backward_bytes(p, splits));
}

void forward_call(const Problem& given, const Array& output, const Array& state, const Array& plan,
                  const std::optional<Array>& partial, int splits, const Stream& stream) {
  const Problem p = checked_problem(given);
  check_inputs(p);
  check_splits(splits);
  if (splits > 1 && !partial) fail("partial must be given where there are splits");
  ForwardCall call{};
  call.output = checked_rows("output", output, p);
  call.state = checked_state(p, state, state_slots(p));
  call.plan = checked_workspace("plan", plan, plan_bytes(p));
  if (partial) call.partial = checked_workspace("partial", *partial, partial_bytes(p, splits));
  call.splits = splits;
  run_on(
      p, stream,
      [&](HostLauncher& emulated) {
        emulated.allow(call.output, 4, 2, true);
        emulated.allow(state_memory(p, call.state, state_slots(p)), false);
        emulated.allow(call.plan, false);
        emulated.allow(call.partial, false);
      },
      [&](Launcher& launcher) { forward(p, call, launcher); });
}

void backward_call(const Problem& given, const Array& state, const Array& plan, const Array& memory,
                   const Array& output, const Array& grad_output, const std::optional<Array>& query,
                   const std::optional<Array>& key, const std::optional<Array>& value,
                   const std::optional<Array>& scores, const std::optional<Array>& prefix_key,
                   const std::optional<Array>& prefix_value, int splits, const Stream& stream) {
  const Problem p = checked_problem(given);
  check_inputs(p);
  check_splits(splits);
  const bool shared = p.prefix_key.data != nullptr && p.prefix_key.strides[0] == 0;
  BackwardCall call{};
  call.output = checked_rows("output", output, p);
  call.grad_output = checked("grad_output", grad_output, shape_of(p.query, 4), 2);
  check_rows("grad_output", call.grad_output);
  call.state = checked_state(p, state, state_slots(p));
  call.plan = checked_workspace("plan", plan, plan_bytes(p));
  call.memory = checked_workspace("memory", memory, backward_bytes(p, splits));
  call.splits = splits;
  const size_t prefix_size = shared ? 4 : 2;
  call.gradients = checked_gradients(
      p, {query, key, value, scores, prefix_key, prefix_value, std::nullopt}, prefix_size);
  const Gradients& gradients = call.gradients;
  check_rows("grad_query", gradients.query);
  check_rows("grad_key", gradients.key);
  check_rows("grad_value", gradients.value);
  check_rows("grad_prefix_key", gradients.prefix_key);
  check_rows("grad_prefix_value", gradients.prefix_value);
  if (scores) checked_contiguous("grad_scores", *scores, shape_of(p.scores, 3));
  run_on(
      p, stream,
      [&](HostLauncher& emulated) {
        emulated.allow(call.output, 4, 2, false);
        emulated.allow(call.grad_output, 4, 2, false);
        emulated.allow(state_memory(p, call.state, state_slots(p)), true);
        emulated.allow(call.plan, true);
        emulated.allow(call.memory, false);
        for (const Operand* x : {&gradients.query, &gradients.key, &gradients.value}) {
          emulated.allow(*x, 4, 2, true);
        }
        for (const Operand* x : {&gradients.prefix_key, &gradients.prefix_value}) {
          emulated.allow(*x, 4, static_cast<int64_t>(prefix_size), true);
        }
        emulated.allow(gradients.scores, 3, 4, true);
      },
      [&](Launcher& launcher) { backward(p, call, launcher); });
}

void masses_call(const Problem& given, const Array& state, const Array& plan, const Stream& stream) {
  const Problem p = checked_problem(given);
  check_inputs(p);
  const int64_t slots = p.documents + 3;
  float* const target = checked_state(p, state, slots);
  const Workspace workspace = checked_workspace("plan", plan, plan_bytes(p));
  run_on(
      p, stream,
      [&](HostLauncher& emulated) {
        Operand operand{target, {p.batch, p.query_heads, slots, p.rows}, {}};
        for (int i = 3, stride = 1; i >= 0; stride *= static_cast<int>(operand.shape[i--])) {
          operand.strides[i] = stride;
        }
        emulated.allow(operand, 4, 4, true);
        emulated.allow(workspace, false);
      },
      [&](Launcher& launcher) { masses(p, target, workspace, launcher); });
}

}  // namespace

void define_functions(py::module_& m) {
  m.def("cuda_readable", &readable, py::arg("problem"),
        "Whether the kernels read each input where it is: in rows that are aligned to 16 bytes.");
  m.def("cuda_sizes", &sizes, py::arg("problem"), py::arg("splits"),
        "Bytes of the plan, of what splits leave, and of the backward's memory.");
  m.def("cuda_forward", &forward_call, py::arg("problem"), py::kw_only(), py::arg("output"),
        py::arg("state"), py::arg("plan"), py::arg("partial"), py::arg("splits"),
        py::arg("stream"));
  m.def("cuda_backward", &backward_call, py::arg("problem"), py::kw_only(), py::arg("state"),
        py::arg("plan"), py::arg("memory"), py::arg("output"), py::arg("grad_output"),
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("scores"),
        py::arg("prefix_key"), py::arg("prefix_value"), py::arg("splits"), py::arg("stream"));
  m.def("cuda_masses", &masses_call, py::arg("problem"), py::kw_only(), py::arg("state"),
        py::arg("plan"), py::arg("stream"));
  m.attr("cuda_architectures") = architectures();
  m.attr("cuda_compiler") = compiler();
  m.def(
      "cuda_kernels",
      [] {
        py::list all;
        for (const Kernel& k : all_kernels()) {
          all.append(py::make_tuple(k.name, k.part, k.threads, k.shared_bytes));
        }
        return all;
      },
      "Name, binary, threads of a block and bytes of its shared memory for every kernel.");
  m.def(
      "cuda_binary", [](const std::string& part) { return py::bytes(std::string(binary_of(part))); },
      py::arg("part"), "The kernels compiled for GPUs: common, bf16_64, bf16_128, f16_64 or f16_128.");
  m.def(
      "emulator_settings",
      [](bool backwards, const std::string& file, int line) {
        emulator::settings() = {backwards, file, line};
      },
      py::kw_only(), py::arg("backwards"), py::arg("file"), py::arg("line"),
      "For tests, of this thread: the last thread of a block first; a barrier that does nothing.");
  m.def(
      "emulator_take_barriers",
      [] {
        py::list places;
        for (const auto& [file, line] : emulator::take_barriers()) {
          places.append(py::make_tuple(file, line));
        }
        return places;
      },
      "File and line of the barriers that were reached since the last call of this function.");
}

}  // namespace dream::cuda
