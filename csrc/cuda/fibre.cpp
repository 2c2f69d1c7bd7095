#include "fibre.h"

#include <ucontext.h>

#include <cstdint>

// Sanitizers follow the stacks only if they are told. To ThreadSanitizer a fibre is a thread; its
// switches order nothing, so that only the emulator's own barriers do.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(DREAM_RACES)
#include <sanitizer/tsan_interface.h>
#endif

// swapcontext makes two system calls to keep the signal mask, which takes longer than most of what
// runs in between.
#if defined(__x86_64__) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(DREAM_RACES)
#define DREAM_OWN_SWITCH 1
#endif

namespace dream::cuda::emulator {
namespace {

#if defined(DREAM_RACES)
constexpr size_t kStackBytes = 32 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

}  // namespace

#if defined(DREAM_OWN_SWITCH)

// Saves what a called function has to preserve, and changes stacks.
asm(R"(
.text
.local dream_switch_stack
.type dream_switch_stack, @function
dream_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dream_switch_stack, . - dream_switch_stack
)");
extern "C" void dream_switch_stack(void** from, void* to);

struct Fibre::State {
  std::unique_ptr<char[]> stack;
  void* pointer = nullptr;
};

void Fibre::start(void (*function)()) {
  if (!state_->stack) state_->stack.reset(new char[kStackBytes]);
  // Six registers, the address to return to, and one that makes the stack as after a call.
  const auto top = reinterpret_cast<uintptr_t>(state_->stack.get() + kStackBytes) & ~uintptr_t{15};
  auto* words = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 8; ++i) words[i] = nullptr;
  words[6] = reinterpret_cast<void*>(function);
  state_->pointer = words;
}

void switch_fibre(Fibre& from, Fibre& to) {
  dream_switch_stack(&from.state_->pointer, to.state_->pointer);
}

#else

struct Fibre::State {
  std::unique_ptr<char[]> stack;
  ucontext_t context;
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;  // of the program's own stack, learnt when it is left
  size_t size = 0;
#endif
#if defined(DREAM_RACES)
  void* thread = nullptr;
  ~State() {
    if (stack && thread) __tsan_destroy_fiber(thread);
    (void)stack.release();
  }
#endif
};

namespace {

thread_local void (*entered)() = nullptr;
#if defined(__SANITIZE_ADDRESS__)
thread_local const void** left_bottom = nullptr;
thread_local size_t* left_size = nullptr;
#endif

void finish_switch(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, left_bottom, left_size);
#else
  (void)fake_stack;
#endif
}

}  // namespace

void Fibre::start(void (*function)()) {
#if defined(DREAM_RACES)
  // To the next block's threads, which nothing orders, the same stack would be shared memory.
  (void)state_->stack.release();
#endif
  if (!state_->stack) state_->stack.reset(new char[kStackBytes]);
  getcontext(&state_->context);
  state_->context.uc_stack.ss_sp = state_->stack.get();
  state_->context.uc_stack.ss_size = kStackBytes;
  state_->context.uc_link = nullptr;
  entered = function;
  makecontext(&state_->context, +[] {
    finish_switch(nullptr);
    entered();
  }, 0);
#if defined(__SANITIZE_ADDRESS__)
  state_->bottom = state_->stack.get();
  state_->size = kStackBytes;
#endif
#if defined(DREAM_RACES)
  if (state_->thread) __tsan_destroy_fiber(state_->thread);
  state_->thread = __tsan_create_fiber(0);
#endif
}

void switch_fibre(Fibre& from, Fibre& to) {
#if defined(DREAM_RACES)
  if (!from.state_->thread) from.state_->thread = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.state_->thread, __tsan_switch_to_fiber_no_sync);
#endif
  void* fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  left_bottom = &from.state_->bottom;
  left_size = &from.state_->size;
  __sanitizer_start_switch_fiber(&fake_stack, to.state_->bottom, to.state_->size);
#endif
  swapcontext(&from.state_->context, &to.state_->context);
  finish_switch(fake_stack);
}

#endif

Fibre::Fibre() : state_(new State) {}
Fibre::~Fibre() = default;
Fibre::Fibre(Fibre&&) noexcept = default;

}  // namespace dream::cuda::emulator
