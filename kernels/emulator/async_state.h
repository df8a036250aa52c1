// Copies under way, mbarriers and matrix products of warpgroups, for the emulator's own source files.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <vector>

#include "kernels/emulator/async.h"
#include "kernels/emulator/matrix.h"
#include "kernels/emulator/state.h"

namespace pykern::emulator {

// Consecutive bytes of shared memory, and where in global memory they come from or go to (null: zeros).
struct Piece {
  char* shared;
  char* global;
  int bytes;
};

// cp.async of one thread: its own writes, which come late.
struct SmallCopy {
  Piece data;
  int filled;  // bytes of shared memory, of which those past data.bytes become zero
  bool landed = false;
};

// An mbarrier of the block.
struct Mbarrier {
  const char* address;
  Actor actor;
  uint32_t count;      // arrivals that a phase takes
  int64_t pending;     // arrivals that the current phase still takes
  int64_t bytes = 0;   // and bytes
  uint32_t phase = 0;  // phases completed
  Actor initialised_by;
  uint32_t initialised_at;
  bool known_to_copies = false;      // a fence came after the initialisation
  uint32_t seen[kClocks] = {};       // what those that arrived in this phase knew
  uint32_t completed[kClocks] = {};  // what a thread knows that has seen the last phase complete
  std::vector<Thread*> polls;
};

// cp.async.bulk, whole boxes of tensors included.
struct BulkCopy {
  char* shared = nullptr;
  int64_t bytes = 0;
  std::vector<Piece> pieces;
  Mbarrier* mbarrier = nullptr;  // of a load
  Site site{};
  std::vector<char> taken;  // content of a store, once shared memory has been read
  bool read = false, waited = false, landed = false;
};

// wgmma.mma_async of a warpgroup. Threads come to it one by one; their operands are taken then.
struct Product {
  ProductShape shape;
  uint64_t a = 0, b = 0;  // descriptors
  Site site{};
  int group = 0;  // how many commits came before
  int arrived = 0, delivered = 0;
  uint32_t time = 0;
  uint32_t known[kClocks];                 // to all its threads
  std::array<float*, 128> accumulators{};  // null once delivered
  std::vector<float> values;               // [128][columns / 2]: accumulators, later results
  std::vector<uint32_t> a_registers;       // [128][4]
  bool done = false;
};

struct Warpgroup {
  int64_t first = 0;  // number of products[0], counted from the block's start
  std::deque<Product> products;
  uint32_t time = 0;  // completed products
  std::vector<Thread*> waiting;
};

struct AsyncThread {
  std::vector<std::vector<SmallCopy>> small_groups{1};  // the last one is still open
  std::vector<std::vector<std::shared_ptr<BulkCopy>>> store_groups{1};
  std::vector<uint32_t> proxy_fences;  // times, ascending
  int64_t products = 0;                // issued
  int committed = 0;                   // groups of products
  int64_t delivered = 0;
  uint32_t products_seen = 0;
  bool registers_fenced = false;
};

struct AsyncBlock {
  std::vector<std::unique_ptr<Mbarrier>> mbarriers;
  int mbarriers_made = 0;
  std::vector<std::shared_ptr<BulkCopy>> loads, stores;  // under way
  Warpgroup warpgroups[kMaxWarpgroups];
};

AsyncThread& async_of(Thread& thread);
AsyncBlock& async_of(Block& block);

// Operands of copies: in one shared object, or in announced global memory, and aligned.
void require_shared(const void* address, size_t bytes, size_t alignment, const char* what, const void* return_address);
void require_global(const void* address, size_t bytes, size_t alignment, bool write, const char* what,
                    const void* return_address);
// Begin a bulk copy between `bytes` bytes of shared memory and the pieces.
void start_load(void* shared, std::vector<Piece> pieces, int64_t bytes, uint64_t* mbarrier, const char* what, Site site,
                const void* return_address);
void start_store(const void* shared, std::vector<Piece> pieces, int64_t bytes, const char* what, Site site,
                 const void* return_address);

// The scheduler's part: lands one copy and returns whether there was any.
bool land_one(Block& block);
// In a random order, now and then: a copy lands early.
void maybe_land(Block& block);
bool has_polls(const Block& block);
// Lets polls return without success.
void retry_polls(Block& block);
std::string describe_poll(const Thread& thread);
// Of a block all of whose threads have exited: empty, or what it has left unfinished.
std::string finish_async(Block& block);

float widen_element(MatrixType type, uint16_t bits);
void unpack(MatrixType type, uint32_t pair, float& low, float& high);

// Takes part in what `thread` knows.
void learn(Thread& thread, const uint32_t* seen);
// Checks that an engine may read shared memory, given what its issuer knows, and marks it as being read.
void begin_engine_read(Block& block, const void* shared, size_t bytes, const uint32_t* known, Actor issuer,
                       const char* engine, const void* return_address);
void end_engine_read(Block& block, const void* shared, size_t bytes, Actor reader, uint32_t time);

}  // namespace pykern::emulator
