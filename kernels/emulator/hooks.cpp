// The calls that -fsanitize=thread puts before every access of the kernels. Only that instrumentation is
// used; the run-time library it usually serves is not linked.
#ifdef PYKERN_EMULATOR_CHECKED

#include <cstddef>
#include <cstdint>

#include "kernels/emulator/machine.h"

using pykern::emulator::AccessKind;
using pykern::emulator::check_access;

#define PYKERN_HOOK(name, bytes, kind) \
  void name(void* address) { check_access(address, bytes, AccessKind::kind, __builtin_return_address(0)); }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

PYKERN_HOOK(__tsan_read1, 1, read)
PYKERN_HOOK(__tsan_read2, 2, read)
PYKERN_HOOK(__tsan_read4, 4, read)
PYKERN_HOOK(__tsan_read8, 8, read)
PYKERN_HOOK(__tsan_read16, 16, read)
PYKERN_HOOK(__tsan_write1, 1, write)
PYKERN_HOOK(__tsan_write2, 2, write)
PYKERN_HOOK(__tsan_write4, 4, write)
PYKERN_HOOK(__tsan_write8, 8, write)
PYKERN_HOOK(__tsan_write16, 16, write)

// The compiler knows of no alignment here, so none is asked for: byte by byte.
static void each_byte(void* address, size_t bytes, AccessKind kind, const void* return_address) {
  for (size_t i = 0; i < bytes; ++i) check_access(static_cast<char*>(address) + i, 1, kind, return_address);
}

#define PYKERN_HOOK_UNALIGNED(bytes)                                                      \
  void __tsan_unaligned_read##bytes(void* address) {                                      \
    each_byte(address, bytes, AccessKind::read, __builtin_return_address(0));             \
  }                                                                                       \
  void __tsan_unaligned_write##bytes(void* address) {                                     \
    each_byte(address, bytes, AccessKind::write, __builtin_return_address(0));            \
  }
PYKERN_HOOK_UNALIGNED(2)
PYKERN_HOOK_UNALIGNED(4)
PYKERN_HOOK_UNALIGNED(8)
PYKERN_HOOK_UNALIGNED(16)

void __tsan_read_range(void* address, unsigned long bytes) {
  each_byte(address, bytes, AccessKind::read, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
  each_byte(address, bytes, AccessKind::write, __builtin_return_address(0));
}

// Guards of function-local statics in launchers.
int8_t __tsan_atomic8_load(const volatile int8_t* address, int) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }

}  // extern "C"

#endif
