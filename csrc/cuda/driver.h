// Launches on a GPU through the driver, which is looked up at run time: nothing links against it.
#pragma once

#include "attention.h"

namespace dream::cuda {

// On a stream of the current device. Raises std::runtime_error with the driver's message.
class DeviceLauncher : public Launcher {
 public:
  explicit DeviceLauncher(void* stream) : stream_(stream) {}
  void launch(const Kernel& kernel, const int (&grid)[3], const Parameters& parameters) override;

 private:
  void* stream_;
};

}  // namespace dream::cuda
