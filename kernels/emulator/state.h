// The emulated machine's parts, for its own source files.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "kernels/emulator/fiber.h"
#include "kernels/emulator/machine.h"

namespace pykern::emulator {

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32, kBarriers = 16;
constexpr int kMaxMbarriers = 64, kMaxWarpgroups = kMaxWarps / 4;

// Who accesses shared memory, as a number: 0 nobody; 1 + n thread n of the block; then the copies that report to
// mbarrier n; then the matrix products of warpgroup n.
using Actor = uint16_t;
constexpr Actor kFirstMbarrier = 1 + kMaxThreads, kFirstWarpgroup = kFirstMbarrier + kMaxMbarriers;
// Clocks: one for each warp, each mbarrier, each warpgroup's products.
constexpr int kClocks = kMaxWarps + kMaxMbarriers + kMaxWarpgroups;
constexpr int clock_of(Actor actor) {
  return actor < kFirstMbarrier ? (actor - 1) / 32 : kMaxWarps + actor - kFirstMbarrier;
}

// What a thread knows of the others: everything that warp w did up to time seen[w] happened before, and so for
// mbarriers (time: phases completed) and products. Times advance when threads synchronise; accesses carry the time
// at which they were made.
struct Clock {
  uint32_t now = 1;
  uint32_t seen[kClocks] = {};
};

struct Block;
struct AsyncThread;  // async_state.h
struct AsyncBlock;

struct Thread {
  enum State { ready, waiting, done };
  Fiber fiber;
  Block* block = nullptr;
  int number = 0;    // in its block
  int64_t rank = 0;  // in the grid
  Index3 index{};
  State state = done;
  // While waiting: at what, where, and with which mask or barrier.
  const char* what = "";
  Site site{};
  unsigned mask = 0;
  int barrier = -1;
  const void* mbarrier = nullptr;  // that it polls
  Clock clock;
  std::unique_ptr<AsyncThread> async;  // made when first needed
  Thread();
  ~Thread();
  Actor actor() const { return static_cast<Actor>(number + 1); }
  int warp() const { return number / 32; }
  int lane() const { return number % 32; }
};

struct Barrier {
  int expected = 0, arrived = 0;
  bool for_all = false;  // expects every thread that has not exited
  Site site{};
  uint32_t seen[kClocks] = {};
  std::vector<Thread*> waiting;
};

// Lanes that have come to a warp collective whose others are still to come.
struct Meeting {
  unsigned mask, expected, arrived;
  const char* what;
  Site site;
  void* brought[32];
  Combine combine;
  void* context;
  bool orders_memory;
};

// The last accesses of one byte of shared memory.
struct Cell {
  Actor writer = 0, reader = 0, other_reader = 0;
  bool atomic = false;
  bool filling = false;  // a copy is on its way here
  bool opaque = false;   // part of an mbarrier
  uint16_t reading = 0;  // copies and products under way that read this
  uint32_t write_time = 0, read_time = 0, other_read_time = 0;
};

// So close behind a shared object, an access was probably meant for it. Nothing else is allocated there; where
// AddressSanitizer watches, it keeps a zone of its own.
#ifdef PYKERN_EMULATOR_CHECKED
constexpr size_t kNearBytes = 256;
#else
constexpr size_t kNearBytes = 0;
#endif

struct SharedObject {
  const void* site;
  char* memory;
  size_t bytes;
  std::unique_ptr<Cell[]> cells;  // in the checked build
  uint32_t window = 0;            // its address in the block's window of shared memory
};

struct Block {
  Index3 index{};
  int64_t number = 0;
  int live = 0;
  std::vector<Thread*> threads;
  Barrier barriers[kBarriers];
  std::vector<Meeting> meetings[kMaxWarps];
  std::vector<SharedObject> shared;  // the first is the dynamic one
  int64_t votes = 0, vote_result = 0;
  bool vote_all = true;
  std::unique_ptr<AsyncBlock> async;  // made when first needed

  Block();
  ~Block();
};

struct Machine {
  Entry kernel{};
  Dim3 grid, block;
  size_t dynamic_bytes = 0, static_bytes = 0;
  Order order;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Thread*> ready;
  std::string error;
  const void* error_address = nullptr;
  int64_t events = 0;  // anything that may let a waiting thread go on
  int64_t events_at_retry = -1;  // when polls were last told to try again
  Counters counters;
};

extern Machine machine;
extern Thread* current;  // null while the host runs

// How many clocks can have advanced: without mbarriers and products only those of warps.
inline int clocks_in_use(const Block& block) { return block.async ? kClocks : kMaxWarps; }

// The thread has published what it knows, for its whole warp: what any lane does from now on is newer.
void released(Thread& thread);

void wake(Thread* thread);
// Whether an access by `actor` at `time` happened before what `thread` does now.
bool happened_before(const Thread& thread, Actor actor, uint32_t time);
std::string actor_name(Actor actor);
// After a thread has exited: those that waited for it may go on.
void thread_exited(Thread* thread);
void check_shared(SharedObject& object, size_t offset, size_t bytes, AccessKind kind, const void* return_address);
// The block's shared object that holds the address, or null.
SharedObject* shared_object(Block& block, const void* address);
// Source file and line of an instruction of this module.
std::string source_place(const void* address);
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace pykern::emulator
