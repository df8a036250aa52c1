// Runs a grid on the CPU: a fiber for each thread, blocks a few at a time, one scheduler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pykern::emulator {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct Index3 {
  unsigned x, y, z;
};

// --- settings -----------------------------------------------------------------------------------------

// In which order ready threads run.
struct Order {
  enum Kind { forward, reverse, random } kind = forward;
  uint64_t seed = 0;  // of random
};

// Every launch runs once in each order; the results must be equal bit for bit.
void set_orders(std::vector<Order> orders);
const std::vector<Order>& orders();

// The compute capability that kernels are chosen for, times ten; 90 at first.
void set_compute_capability(int capability);
int compute_capability();

// Launches since the module was loaded, and threads run; tests ask whether kernels have run at all.
struct Counters {
  int64_t launches = 0, threads = 0, switches = 0;
};
const Counters& counters();

// --- the host's side -----------------------------------------------------------------------------------

// What every thread of a grid runs.
struct Entry {
  void (*run)(const void* call);
  const void* call;
};

// Null, or the report of what went wrong; valid until the next launch.
const char* launch(const Dim3& blocks, const Dim3& threads, size_t dynamic_shared, Entry kernel);

// --- a kernel's side -----------------------------------------------------------------------------------

// Where in a source file something was called.
struct Site {
  const char* file;
  int line;
};

Index3 thread_index();
Index3 block_index();
Dim3 block_size();
Dim3 grid_size();

int lane();
void* static_shared(const void* site, size_t bytes, size_t alignment);
unsigned char* dynamic_shared();

// Stops the kernel; the launch returns the message. The place is found from the return address.
[[noreturn]] void fail(const std::string& message, const void* return_address = nullptr);

// Waits until `expected` threads of the block have arrived at the barrier (0: all that have not exited).
void wait_barrier(int barrier, int expected, Site site, const char* what);
// Arrives without waiting.
void arrive_barrier(int barrier, int expected, Site site);

// --- warp collectives
// All lanes of `mask` meet; the last one calls combine on what each brought (null for lanes outside the
// mask), then all go on. `orders_memory`: accesses before are seen by all lanes afterwards.
using Combine = void (*)(void* const* lanes, unsigned mask, void* context);
void meet(unsigned mask, void* brought, Combine combine, void* context, const char* what, Site site,
          bool orders_memory = false);

// Lets others run; in spinning loops. In a random order also before atomics, as `maybe_yield`.
void yield();
void maybe_yield();

// --- checks of memory accesses
enum class AccessKind { read, write, atomic };
void check_access(const void* address, size_t bytes, AccessKind kind, const void* return_address);

bool in_shared(const void* address, size_t bytes);

}  // namespace pykern::emulator
