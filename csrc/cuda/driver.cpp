#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "binaries.h"

namespace dream::cuda {
namespace {

// Of cuda.h: what of the driver's interface is used here. Its versions never change.
using Result = int;
using Context = void*;
using Module = void*;
using Function = void*;
constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

struct Driver {
  Result (*current_context)(Context*);
  Result (*load_module)(Module*, const void*);
  Result (*get_function)(Function*, Module, const char*);
  Result (*set_attribute)(Function, int, int);
  Result (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   void*, void**, void**);
  Result (*error_string)(Result, const char**);
};

template <typename F>
void look_up(void* library, const char* name, F* function) {
  *function = reinterpret_cast<F>(dlsym(library, name));
  if (*function == nullptr) {
    throw std::runtime_error(std::string("the CUDA driver has no ") + name);
  }
}

const Driver& driver() {
  static const Driver found = [] {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) {
      throw std::runtime_error(std::string("the CUDA driver cannot be loaded: ") + dlerror());
    }
    Driver d;
    look_up(library, "cuCtxGetCurrent", &d.current_context);
    look_up(library, "cuModuleLoadData", &d.load_module);
    look_up(library, "cuModuleGetFunction", &d.get_function);
    look_up(library, "cuFuncSetAttribute", &d.set_attribute);
    look_up(library, "cuLaunchKernel", &d.launch);
    look_up(library, "cuGetErrorString", &d.error_string);
    return d;
  }();
  return found;
}

void check(Result result, const char* what) {
  if (result == 0) return;
  const char* text = nullptr;
  driver().error_string(result, &text);
  throw std::runtime_error(std::string(what) + " failed: " +
                           (text != nullptr ? text : "unknown error of the CUDA driver"));
}

std::mutex mutex;
std::map<std::pair<Context, std::string_view>, Module> modules;  // by context and part
std::map<std::pair<Context, const Kernel*>, Function> functions;

// The kernel in the current context, loaded at its first call.
Function function_of(const Kernel& kernel) {
  Context context = nullptr;
  check(driver().current_context(&context), "cuCtxGetCurrent");
  const std::lock_guard<std::mutex> lock(mutex);
  Function& function = functions[{context, &kernel}];
  if (function != nullptr) return function;
  Module& module = modules[{context, kernel.part}];
  if (module == nullptr) {
    const std::string_view binary = binary_of(kernel.part);
    if (binary.empty()) throw std::runtime_error("the kernels for GPUs were left out of this build");
    check(driver().load_module(&module, binary.data()), "cuModuleLoadData");
  }
  Function found = nullptr;
  check(driver().get_function(&found, module, kernel.name), "cuModuleGetFunction");
  check(driver().set_attribute(found, kMaxDynamicSharedBytes, static_cast<int>(kernel.shared_bytes)),
        "cuFuncSetAttribute");
  return function = found;
}

}  // namespace

void DeviceLauncher::launch(const Kernel& kernel, const int (&grid)[3],
                            const Parameters& parameters) {
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  check(driver().launch(function_of(kernel), grid[0], grid[1], grid[2], kernel.threads, 1, 1,
                        static_cast<unsigned>(kernel.shared_bytes), stream_, arguments, nullptr),
        kernel.name);
}

}  // namespace dream::cuda
