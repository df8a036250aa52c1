#include "kernels/emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace pykern::emulator {
namespace {

Fiber* starting = nullptr;

size_t page() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

// Saves what the calling convention says a call must keep, exchanges stack pointers, restores.
#if defined(__x86_64__)
extern "C" void pykern_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden pykern_switch_stack
.globl pykern_switch_stack
.type pykern_switch_stack,@function
pykern_switch_stack:
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
.size pykern_switch_stack,.-pykern_switch_stack
)");
constexpr int kSavedWords = 6;
#elif defined(__aarch64__)
extern "C" void pykern_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden pykern_switch_stack
.globl pykern_switch_stack
.type pykern_switch_stack,%function
pykern_switch_stack:
  sub sp, sp, #176
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #176
  ret
.size pykern_switch_stack,.-pykern_switch_stack
)");
#else
#error "the emulator has no stack switch for this processor"
#endif

Fiber::~Fiber() {
  if (stack_) munmap(static_cast<char*>(stack_) - page(), kStackBytes + page());
}

void Fiber::prepare(void (*entry)(void*), void* argument) {
  if (!stack_) {
    void* memory =
        mmap(nullptr, kStackBytes + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    mprotect(memory, page(), PROT_NONE);
    stack_ = static_cast<char*>(memory) + page();
    static size_t made = 0;
    colour_ = made++ % 32 * 448;
  }
#if defined(__SANITIZE_ADDRESS__)
  // A kernel that was given up in the middle leaves its variables marked.
  __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
  entry_ = entry;
  argument_ = argument;
  fiber_fake_stack_ = nullptr;
  const uintptr_t end = reinterpret_cast<uintptr_t>(stack_) + kStackBytes - colour_;
  auto* top = reinterpret_cast<uintptr_t*>(end & ~uintptr_t{63});
#if defined(__x86_64__)
  // As after a call: the stack pointer is 8 below a multiple of 16 when the first instruction runs.
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(&Fiber::first_step);
  for (int word = 0; word < kSavedWords; ++word) *--top = 0;
#else
  top -= 176 / sizeof(uintptr_t);
  top[11] = reinterpret_cast<uintptr_t>(&Fiber::first_step);
#endif
  stack_pointer_ = top;
}

void Fiber::first_step() {
  Fiber* self = starting;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self->scheduler_stack_, &self->scheduler_stack_bytes_);
#endif
  self->entry_(self->argument_);
  std::abort();
}

void Fiber::resume() {
  starting = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stack_, kStackBytes);
#endif
  pykern_switch_stack(&scheduler_pointer_, stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber_fake_stack_, scheduler_stack_, scheduler_stack_bytes_);
#endif
  pykern_switch_stack(&stack_pointer_, scheduler_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber_fake_stack_, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

}  // namespace pykern::emulator
