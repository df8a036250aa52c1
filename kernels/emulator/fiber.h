// One stack for each CUDA thread, and a switch between two of them that costs a few nanoseconds.
#pragma once

#include <cstddef>

namespace pykern::emulator {

// A stack that can be entered, left and entered again. The lowest page is not accessible, so an overflow
// stops the program instead of reaching the neighbour.
class Fiber {
 public:
  static constexpr size_t kStackBytes = 128 * 1024;

  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next resume() call entry(argument) on this stack, whatever ran there before. entry must
  // never return: its last act is suspend().
  void prepare(void (*entry)(void*), void* argument);
  // Runs the fiber until it suspends. Call from the scheduler only.
  void resume();
  // Goes back to the scheduler. Call from the running fiber only.
  void suspend();

  bool holds(const void* address) const {
    return address >= stack_ && address < static_cast<const char*>(stack_) + kStackBytes;
  }

 private:
  static void first_step();

  void* stack_ = nullptr;           // above the guard page
  // Left free at the top: stacks at equal offsets in their pages would share few lines of the cache.
  size_t colour_ = 0;
  void* stack_pointer_ = nullptr;   // while suspended
  void* scheduler_pointer_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  // What AddressSanitizer keeps for the stack that is left.
  void* fiber_fake_stack_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

}  // namespace pykern::emulator
