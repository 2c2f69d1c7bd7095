// A stack of its own that is switched to and from within one thread of the system.
#pragma once

#include <cstddef>
#include <memory>

namespace dream::cuda::emulator {

class Fibre {
 public:
  Fibre();
  ~Fibre();
  Fibre(Fibre&&) noexcept;

  // Begins anew: the next switch to it calls `function`, which must not return.
  void start(void (*function)());

 private:
  struct State;
  std::unique_ptr<State> state_;
  friend void switch_fibre(Fibre& from, Fibre& to);
};

// Continues `to`, and returns when something switches to `from`. A fibre that was never started
// stands for the stack that the program runs on.
void switch_fibre(Fibre& from, Fibre& to);

}  // namespace dream::cuda::emulator
