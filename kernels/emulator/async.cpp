// cp.async, mbarriers, bulk copies of consecutive bytes, and when they land.
#include "kernels/emulator/async.h"

#include <algorithm>
#include <cstring>

#include "kernels/emulator/async_state.h"
#include "kernels/emulator/memory.h"

namespace pykern::emulator {

Thread::Thread() = default;
Thread::~Thread() = default;

AsyncThread& async_of(Thread& thread) {
  if (!thread.async) thread.async = std::make_unique<AsyncThread>();
  return *thread.async;
}

AsyncBlock& async_of(Block& block) {
  if (!block.async) block.async = std::make_unique<AsyncBlock>();
  return *block.async;
}

void learn(Thread& thread, const uint32_t* seen) {
  Clock& clock = thread.clock;
  for (int i = 0; i < kClocks; ++i) clock.seen[i] = std::max(clock.seen[i], seen[i]);
  clock.now = std::max(clock.now, clock.seen[thread.warp()] + 1);
}

uint32_t window_address(const void* shared) {
  const SharedObject* object = shared_object(*current->block, shared);
  if (!object) fail("an address outside shared memory where shared memory is expected", __builtin_return_address(0));
  return object->window + static_cast<uint32_t>(static_cast<const char*>(shared) - object->memory);
}

char* window_pointer(uint32_t address) {
  for (const SharedObject& object : current->block->shared) {
    if (address >= object.window && address - object.window < object.bytes)
      return object.memory + (address - object.window);
  }
  return nullptr;
}

void require_shared(const void* address, size_t bytes, size_t alignment, const char* what, const void* return_address) {
  if (!in_shared(address, bytes))
    fail(text("%s: %zu bytes that are not all in one shared object", what, bytes), return_address);
  if (window_address(address) % alignment) {
    fail(text("%s: a misaligned address of shared memory, %zu past a multiple of %zu", what,
              static_cast<size_t>(window_address(address) % alignment), alignment),
         return_address);
  }
}

void require_global(const void* address, size_t bytes, size_t alignment, bool write, const char* what,
                    const void* return_address) {
  if (reinterpret_cast<uintptr_t>(address) % alignment) {
    fail(text("%s: a misaligned address of global memory, %zu past a multiple of %zu", what,
              static_cast<size_t>(reinterpret_cast<uintptr_t>(address) % alignment), alignment),
         return_address);
  }
#ifdef PYKERN_EMULATOR_CHECKED
  if (!global_access_allowed(address, bytes, write)) fail(describe_global(address, bytes, write), return_address);
#else
  (void)bytes;
  (void)write;
#endif
}

namespace {

bool random_chance(unsigned one_in) { return machine.order.kind == Order::random && machine.random() % one_in == 0; }

Cell* cells_of(Block& block, const void* shared) {
  SharedObject* object = shared_object(block, shared);
  return object->cells ? &object->cells[static_cast<const char*>(shared) - object->memory] : nullptr;
}

// Whether the ordinary write that the cell remembers has been made visible to copies and tensor cores, on the way
// to one who has these times.
bool fenced(const Block& block, const Cell& cell, const uint32_t* known, Actor issuer) {
  if (cell.writer == 0 || cell.writer >= kFirstMbarrier) return true;
  const Thread& writer = *block.threads[cell.writer - 1];
  if (!writer.async) return false;
  const auto& fences = writer.async->proxy_fences;
  const auto fence = std::lower_bound(fences.begin(), fences.end(), cell.write_time);
  if (fence == fences.end()) return false;
  return cell.writer == issuer || known[clock_of(cell.writer)] > *fence;
}

// Shared memory that a copy is going to fill: poison until it lands.
void begin_fill(void* shared, size_t bytes, bool engine, const void* return_address) {
  Block& block = *current->block;
  if (Cell* cells = cells_of(block, shared)) {
    SharedObject& object = *shared_object(block, shared);
    const auto offset = static_cast<size_t>(static_cast<char*>(shared) - object.memory);
    for (size_t i = 0; engine && i < bytes; ++i) {
      if (!fenced(block, cells[i], current->clock.seen, current->actor())) {
        fail(text("a bulk copy into byte %zu of a shared object, which thread %d has written without fence.proxy.async",
                  offset + i, cells[i].writer - 1),
             return_address);
      }
    }
    check_shared(object, offset, bytes, AccessKind::write, return_address);
    for (size_t i = 0; i < bytes; ++i) cells[i].filling = true;
  }
  poison(shared, bytes);
}

void end_fill(Block& block, void* shared, size_t bytes, Actor writer, uint32_t time) {
  Cell* cells = cells_of(block, shared);
  for (size_t i = 0; cells && i < bytes; ++i) {
    cells[i].filling = false;
    cells[i].writer = writer;
    cells[i].write_time = time;
  }
}

void copy_in(const Piece& piece) {
  if (piece.global) {
    std::memcpy(piece.shared, piece.global, static_cast<size_t>(piece.bytes));
  } else {
    std::memset(piece.shared, 0, static_cast<size_t>(piece.bytes));
  }
}

void land_data(SmallCopy& copy) {
  if (copy.data.bytes > 0) copy_in(copy.data);
  std::memset(copy.data.shared + copy.data.bytes, 0, static_cast<size_t>(copy.filled - copy.data.bytes));
  copy.landed = true;
}

}  // namespace

void begin_engine_read(Block& block, const void* shared, size_t bytes, const uint32_t* known, Actor issuer,
                       const char* engine, const void* return_address) {
  Cell* cells = cells_of(block, shared);
  if (!cells) return;
  const SharedObject& object = *shared_object(block, shared);
  const auto offset = static_cast<size_t>(static_cast<const char*>(shared) - object.memory);
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = cells[i];
    if (cell.filling) {
      fail(text("%s reads byte %zu of a shared object, which an asynchronous copy has not filled yet", engine,
                offset + i),
           return_address);
    }
    if (cell.writer && cell.writer != issuer && known[clock_of(cell.writer)] < cell.write_time) {
      fail(text("race in shared memory: %s reads byte %zu of %zu after a write by %s with no barrier between", engine,
                offset + i, object.bytes, actor_name(cell.writer).c_str()),
           return_address);
    }
    if (!fenced(block, cell, known, issuer)) {
      fail(text("%s reads byte %zu of a shared object, which thread %d has written without fence.proxy.async before "
                "the barrier",
                engine, offset + i, cell.writer - 1),
           return_address);
    }
    ++cell.reading;
  }
}

void end_engine_read(Block& block, const void* shared, size_t bytes, Actor reader, uint32_t time) {
  Cell* cells = cells_of(block, shared);
  for (size_t i = 0; cells && i < bytes; ++i) {
    --cells[i].reading;
    if (cells[i].reader != 0 && cells[i].reader != reader) {
      cells[i].other_reader = cells[i].reader;
      cells[i].other_read_time = cells[i].read_time;
    }
    cells[i].reader = reader;
    cells[i].read_time = time;
  }
}

// --- cp.async ----------------------------------------------------------------------------------------------

void cp_async(void* shared, const void* global, int bytes, int source_bytes) {
  const void* from = __builtin_return_address(0);
  const auto size = static_cast<size_t>(bytes);
  if (source_bytes < 0 || source_bytes > bytes)
    fail(text("cp.async: %d of %d bytes to read", source_bytes, bytes), from);
  require_shared(shared, size, size, "cp.async", from);
  if (source_bytes > 0) require_global(global, static_cast<size_t>(source_bytes), size, false, "cp.async", from);
  begin_fill(shared, size, false, from);
  auto& groups = async_of(*current).small_groups;
  groups.back().push_back(
      {{static_cast<char*>(shared), static_cast<char*>(const_cast<void*>(global)), source_bytes}, bytes});
  if (random_chance(4)) {
    auto& group = groups[machine.random() % groups.size()];
    for (SmallCopy& copy : group) {
      if (!copy.landed && machine.random() % 2) land_data(copy);
    }
  }
}

void cp_async_commit() { async_of(*current).small_groups.emplace_back(); }

namespace {

void finish_small_groups(size_t count) {
  auto& groups = async_of(*current).small_groups;
  for (size_t i = 0; i < count; ++i) {
    for (SmallCopy& copy : groups[i]) {
      if (!copy.landed) land_data(copy);
      end_fill(*current->block, copy.data.shared, static_cast<size_t>(copy.filled), current->actor(),
               current->clock.now);
    }
  }
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(count));
  if (groups.empty()) groups.emplace_back();
}

}  // namespace

void cp_async_wait(int groups_left) {
  const size_t committed = async_of(*current).small_groups.size() - 1, left = static_cast<size_t>(groups_left);
  if (committed > left) finish_small_groups(committed - left);
}

void cp_async_wait_all() { finish_small_groups(async_of(*current).small_groups.size()); }

// --- mbarriers ---------------------------------------------------------------------------------------------

namespace {

std::string place(const Block& block, const void* shared) {
  const SharedObject& object = *shared_object(const_cast<Block&>(block), shared);
  return text("byte %zu of %s shared memory", static_cast<size_t>(static_cast<const char*>(shared) - object.memory),
              object.site ? "static" : "dynamic");
}

Mbarrier* find(Block& block, const void* address) {
  if (!block.async) return nullptr;
  for (auto& mbarrier : block.async->mbarriers) {
    if (mbarrier->address == address) return mbarrier.get();
  }
  return nullptr;
}

Mbarrier& use(const void* address, const char* what, const void* return_address) {
  Mbarrier* mbarrier = find(*current->block, address);
  if (!mbarrier) fail(text("%s: no mbarrier has been initialised there", what), return_address);
  if (!happened_before(*current, mbarrier->initialised_by, mbarrier->initialised_at)) {
    fail(text("%s: race with the mbarrier's initialisation by %s, no barrier between", what,
              actor_name(mbarrier->initialised_by).c_str()),
         return_address);
  }
  return *mbarrier;
}

void complete_phase(Mbarrier& mbarrier) {
  if (mbarrier.pending != 0 || mbarrier.bytes != 0) return;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.count;
  for (int i = 0; i < kClocks; ++i) {
    mbarrier.completed[i] = std::max(mbarrier.completed[i], mbarrier.seen[i]);
    mbarrier.seen[i] = 0;
  }
  mbarrier.completed[clock_of(mbarrier.actor)] = mbarrier.phase;
  ++machine.events;
  for (Thread* thread : mbarrier.polls) wake(thread);
  mbarrier.polls.clear();
}

void expect(Mbarrier& mbarrier, uint32_t bytes, const void* return_address) {
  mbarrier.bytes += bytes;
  if (mbarrier.bytes >= 1 << 20) fail("mbarrier: more than 2^20 - 1 bytes in one phase", return_address);
}

}  // namespace

void mbarrier_init(uint64_t* address, uint32_t count) {
  const void* from = __builtin_return_address(0);
  require_shared(address, 8, 8, "mbarrier.init", from);
  if (find(*current->block, address)) fail("mbarrier.init: there is an mbarrier already", from);
  if (count == 0 || count >= 1u << 20) fail(text("mbarrier.init: %u arrivals, expected 1 to 2^20 - 1", count), from);
  check_access(address, 8, AccessKind::write, from);
  AsyncBlock& async = async_of(*current->block);
  if (async.mbarriers_made == kMaxMbarriers) fail(text("more than %d mbarriers in one block", kMaxMbarriers), from);
  auto made = std::make_unique<Mbarrier>();
  made->address = reinterpret_cast<const char*>(address);
  made->actor = static_cast<Actor>(kFirstMbarrier + async.mbarriers_made++);
  made->count = count;
  made->pending = count;
  made->initialised_by = current->actor();
  made->initialised_at = current->clock.now;
  async.mbarriers.push_back(std::move(made));
  if (Cell* cells = cells_of(*current->block, address)) {
    for (int i = 0; i < 8; ++i) cells[i].opaque = true;
  }
}

void mbarrier_invalidate(uint64_t* address) {
  const void* from = __builtin_return_address(0);
  Mbarrier& mbarrier = use(address, "mbarrier.inval", from);
  const auto& loads = async_of(*current->block).loads;
  const bool reported_to =
      std::any_of(loads.begin(), loads.end(), [&](const auto& copy) { return copy->mbarrier == &mbarrier; });
  if (!mbarrier.polls.empty() || mbarrier.bytes != 0 || reported_to)
    fail("mbarrier.inval: the mbarrier is in use", from);
  if (Cell* cells = cells_of(*current->block, address)) {
    for (int i = 0; i < 8; ++i) {
      cells[i].opaque = false;
      cells[i].writer = current->actor();
      cells[i].write_time = current->clock.now;
    }
  }
  auto& mbarriers = current->block->async->mbarriers;
  mbarriers.erase(
      std::find_if(mbarriers.begin(), mbarriers.end(), [&](const auto& one) { return one.get() == &mbarrier; }));
}

void mbarrier_expect(uint64_t* address, uint32_t bytes) {
  const void* from = __builtin_return_address(0);
  expect(use(address, "mbarrier.expect_tx", from), bytes, from);
}

void mbarrier_arrive(uint64_t* address, uint32_t bytes) {
  const void* from = __builtin_return_address(0);
  maybe_yield();
  Mbarrier& mbarrier = use(address, "mbarrier.arrive", from);
  expect(mbarrier, bytes, from);
  if (mbarrier.pending == 0) {
    fail(text("mbarrier at %s: more than its %u arrivals in one phase", place(*current->block, address).c_str(),
              mbarrier.count),
         from);
  }
  --mbarrier.pending;
  ++machine.events;
  Clock& clock = current->clock;
  for (int i = 0; i < kClocks; ++i) mbarrier.seen[i] = std::max(mbarrier.seen[i], clock.seen[i]);
  uint32_t& own = mbarrier.seen[current->warp()];
  own = std::max(own, clock.now);
  released(*current);
  complete_phase(mbarrier);
}

bool mbarrier_try_wait(uint64_t* address, uint32_t parity, Site site) {
  const void* from = __builtin_return_address(0);
  Thread* self = current;
  Mbarrier& mbarrier = use(address, "mbarrier.try_wait", from);
  if (parity > 1) fail(text("mbarrier.try_wait: parity %u", parity), from);
  if ((mbarrier.phase & 1) == parity) {
    self->state = Thread::waiting;
    self->what = "mbarrier.try_wait";
    self->site = site;
    self->mbarrier = address;
    mbarrier.polls.push_back(self);
    // The hardware may give up at any time.
    if (random_chance(4)) {
      mbarrier.polls.pop_back();
      wake(self);
    }
    self->fiber.suspend();
    self->mbarrier = nullptr;
  }
  if ((mbarrier.phase & 1) == parity) return false;
  learn(*self, mbarrier.completed);
  return true;
}

void proxy_fence() {
  auto& fences = async_of(*current).proxy_fences;
  if (fences.empty() || fences.back() != current->clock.now) fences.push_back(current->clock.now);
  ++current->clock.now;
  mbarrier_init_fence();
}

void mbarrier_init_fence() {
  for (auto& mbarrier : async_of(*current->block).mbarriers) {
    if (mbarrier->initialised_by == current->actor()) mbarrier->known_to_copies = true;
  }
}

// --- bulk copies -------------------------------------------------------------------------------------------

void start_load(void* shared, std::vector<Piece> pieces, int64_t bytes, uint64_t* address, const char* what, Site site,
                const void* return_address) {
  Mbarrier& mbarrier = use(address, what, return_address);
  if (!mbarrier.known_to_copies) {
    fail(text("%s: its mbarrier was initialised without fence.mbarrier_init or fence.proxy.async", what),
         return_address);
  }
  begin_fill(shared, static_cast<size_t>(bytes), true, return_address);
  auto copy = std::make_shared<BulkCopy>();
  copy->shared = static_cast<char*>(const_cast<void*>(shared));
  copy->pieces = std::move(pieces);
  copy->bytes = bytes;
  copy->mbarrier = &mbarrier;
  copy->site = site;
  async_of(*current->block).loads.push_back(std::move(copy));
}

void start_store(const void* shared, std::vector<Piece> pieces, int64_t bytes, const char* what, Site site,
                 const void* return_address) {
  begin_engine_read(*current->block, shared, static_cast<size_t>(bytes), current->clock.seen, current->actor(), what,
                    return_address);
  auto copy = std::make_shared<BulkCopy>();
  copy->shared = static_cast<char*>(const_cast<void*>(shared));
  copy->pieces = std::move(pieces);
  copy->bytes = bytes;
  copy->mbarrier = nullptr;
  copy->site = site;
  async_of(*current->block).stores.push_back(copy);
  async_of(*current).store_groups.back().push_back(std::move(copy));
}

namespace {

void take(BulkCopy& copy) {
  if (copy.read) return;
  for (const Piece& piece : copy.pieces) copy.taken.insert(copy.taken.end(), piece.shared, piece.shared + piece.bytes);
  copy.read = true;
}

void land(BulkCopy& copy) {
  if (copy.landed) return;
  take(copy);
  size_t at = 0;
  for (const Piece& piece : copy.pieces) {
    std::memcpy(piece.global, copy.taken.data() + at, static_cast<size_t>(piece.bytes));
    at += static_cast<size_t>(piece.bytes);
  }
  copy.landed = true;
}

}  // namespace

// --- the scheduler's part ----------------------------------------------------------------------------------

bool land_one(Block& block) {
  if (!block.async || block.async->loads.empty()) return false;
  auto& loads = block.async->loads;
  const size_t chosen = machine.order.kind == Order::forward   ? 0
                        : machine.order.kind == Order::reverse ? loads.size() - 1
                                                               : machine.random() % loads.size();
  const auto copy = loads[chosen];
  loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(chosen));
  Mbarrier& mbarrier = *copy->mbarrier;
  for (const Piece& piece : copy->pieces) {
    copy_in(piece);
    end_fill(block, piece.shared, static_cast<size_t>(piece.bytes), mbarrier.actor, mbarrier.phase + 1);
  }
  mbarrier.bytes -= copy->bytes;
  ++machine.events;
  complete_phase(mbarrier);
  return true;
}

void maybe_land(Block& block) {
  if (!block.async || !random_chance(4)) return;
  land_one(block);
  for (auto& copy : block.async->stores) {
    if (machine.random() % 4 == 0) land(*copy);
  }
}

bool has_polls(const Block& block) {
  if (!block.async) return false;
  const auto& mbarriers = block.async->mbarriers;
  return std::any_of(mbarriers.begin(), mbarriers.end(), [](const auto& mbarrier) { return !mbarrier->polls.empty(); });
}

void retry_polls(Block& block) {
  if (!block.async) return;
  for (auto& mbarrier : block.async->mbarriers) {
    for (Thread* thread : mbarrier->polls) wake(thread);
    mbarrier->polls.clear();
  }
}

std::string describe_poll(const Thread& thread) {
  const Mbarrier* mbarrier = find(*thread.block, thread.mbarrier);
  if (!mbarrier) return "poll an mbarrier that is gone";
  return text("wait for phase %u of the mbarrier at %s (%s:%d), which misses %lld of %u arrivals and %lld bytes",
              mbarrier->phase, place(*thread.block, mbarrier->address).c_str(), thread.site.file, thread.site.line,
              static_cast<long long>(mbarrier->pending), mbarrier->count, static_cast<long long>(mbarrier->bytes));
}

std::string finish_async(Block& block) {
  if (!block.async) return "";
  const auto report = [&](const BulkCopy& copy, const char* what) {
    return text("block (%u, %u, %u) has exited while a bulk copy %s shared memory was under way (%s:%d)", block.index.x,
                block.index.y, block.index.z, what, copy.site.file, copy.site.line);
  };
  if (!block.async->loads.empty()) return report(*block.async->loads.front(), "into");
  for (auto& copy : block.async->stores) {
    if (!copy->waited) return report(*copy, "from");
    land(*copy);
  }
  for (const Warpgroup& group : block.async->warpgroups) {
    for (const Product& product : group.products) {
      if (!product.done) {
        return text(
            "block (%u, %u, %u) has exited before the end of a wgmma that %d of 128 threads have issued (%s:%d)",
            block.index.x, block.index.y, block.index.z, product.arrived, product.site.file, product.site.line);
      }
    }
  }
  return "";
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* mbarrier, Site site) {
  const void* from = __builtin_return_address(0);
  if (bytes == 0 || bytes % 16) fail(text("cp.async.bulk: %u bytes, expected a multiple of 16", bytes), from);
  require_shared(shared, bytes, 16, "cp.async.bulk", from);
  require_global(global, bytes, 16, false, "cp.async.bulk", from);
  start_load(shared,
             {{static_cast<char*>(shared), static_cast<char*>(const_cast<void*>(global)), static_cast<int>(bytes)}},
             bytes, mbarrier, "cp.async.bulk", site, from);
}

void bulk_store(void* global, const void* shared, uint32_t bytes, Site site) {
  const void* from = __builtin_return_address(0);
  if (bytes == 0 || bytes % 16) fail(text("cp.async.bulk: %u bytes, expected a multiple of 16", bytes), from);
  require_shared(shared, bytes, 16, "cp.async.bulk", from);
  require_global(global, bytes, 16, true, "cp.async.bulk", from);
  start_store(shared,
              {{static_cast<char*>(const_cast<void*>(shared)), static_cast<char*>(global), static_cast<int>(bytes)}},
              bytes, "cp.async.bulk", site, from);
}

void bulk_commit() { async_of(*current).store_groups.emplace_back(); }

void bulk_wait(int groups_left, bool reads_only) {
  auto& groups = async_of(*current).store_groups;
  const auto committed = static_cast<std::ptrdiff_t>(groups.size()) - 1 - groups_left;
  for (std::ptrdiff_t i = 0; i < committed; ++i) {
    for (auto& copy : groups[static_cast<size_t>(i)]) {
      take(*copy);
      if (!reads_only) land(*copy);
      if (!copy->waited) {
        end_engine_read(*current->block, copy->shared, static_cast<size_t>(copy->bytes), current->actor(),
                        current->clock.now);
      }
      copy->waited = true;
    }
  }
  if (!reads_only && committed > 0) groups.erase(groups.begin(), groups.begin() + committed);
}

}  // namespace pykern::emulator
