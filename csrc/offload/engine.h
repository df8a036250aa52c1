// Moves bytes between tensors and one or two media on its own threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "offload/buffers.h"
#include "offload/link.h"
#include "offload/medium.h"
#include "offload/tier.h"

namespace pykern {

// An item is a block of bytes, gathered from any number of tensors, its sources. Its life: queued
// with the sources held -> written, sources dropped -> reserved or loaded into a buffer any number
// of times -> released. While the sources are held, a load is answered from them: with the tensor
// itself if it is the whole block.
//
// With two tiers, memory comes first: what finds no room there goes to the file, and while the
// memory is nearly full the oldest items are spilled there, unless somebody wants them.
//
// Tensors are dropped by callers only, never by a worker: a tensor that Python knows needs the
// interpreter's lock to die, and a worker that waits for it could wait for ever.
class Engine {
 public:
  struct Options {
    int64_t threads = 2;
    int64_t queue_bytes = 0;    // sources held by unfinished writes, unless a single block is larger
    int64_t buffer_bytes = 0;   // buffers kept for the next loads
    // >= 0, for hunting: random pauses around each copy, freed bytes are poisoned, and what comes
    // back must be what was stored.
    int64_t delay_seed = -1;
    Link::Rates link;
  };

  // One tier, or memory and a file.
  Engine(std::vector<std::unique_ptr<Tier>> tiers, const Options& options);
  ~Engine();

  // Once, first: fixed slots in the first tier, each as large as told. An empty string, or why not.
  std::string lay_out(const std::vector<int64_t>& slot_bytes);
  // Makes room for `bytes` in the last tier now; an empty string, or why that failed.
  std::string preallocate(int64_t bytes);
  // Starts writing a block. The pieces lie in the sources, are sorted and don't overlap; what lies
  // between them comes back undefined. Waits while the queue is full. Returns the item's number, or
  // -1 if there is no room or earlier writes failed: the caller keeps the tensors.
  // slot: a planned one, or -1. Whose copy is on its way back from there is waited for; it is an
  // error if anybody else has it.
  // tier: -1 for the first with room.
  int64_t store(std::vector<torch::stable::Tensor> sources, std::vector<Piece> pieces, int64_t bytes, int64_t slot,
                int64_t tier);
  // Waits until the item is written and drops its sources, whoever reserved it. False if the write
  // failed: the sources stay, and loads are answered from them.
  bool settle(int64_t item);
  // Starts reading, so that a later load need not wait, and keeps what was read until unreserve.
  void reserve(int64_t item);
  void unreserve(int64_t item);
  // The item's bytes as a tensor. Loads of one item share one buffer as long as any of them, or a
  // reservation, keeps it alive.
  torch::stable::Tensor load(int64_t item);
  void release(int64_t item);
  // Waits until the threads have nothing to do, and drops the sources of what they wrote.
  void synchronize();

  // Why writes or growth failed, once; then an empty string.
  std::string take_failure();
  std::string description() const;
  // Seconds that loads and stores waited; writes, their bytes, reads, their bytes, forwards, their
  // bytes; of all tiers: slots, most slots, bytes in slots, most bytes in slots, extent, growths;
  // allocations of buffers; spills, their bytes; bytes in slots of the file; sums over planned
  // stores: bytes of the slots, of the blocks in them.
  std::vector<double> counters();
  void reset_counters();

 private:
  struct Item {
    int64_t number = 0, bytes = 0;
    Tier* tier = nullptr;
    int64_t offset = -1;                 // in the tier; -1: it has given up its place
    int64_t slot = -1;
    std::vector<torch::stable::Tensor> sources;
    std::vector<Piece> pieces;           // what they point to is gone once the sources are dropped
    std::shared_ptr<Buffer> buffer;      // held for those who reserved
    std::weak_ptr<Buffer> shared;        // the same, or the one that a caller still uses
    int64_t reservations = 0;
    int64_t active = 0;                  // threads at work on it: one may write, and one gather
    bool held = true;                    // the sources are there
    bool stored = false, failed = false, reading = false, spilling = false, released = false;
    std::string error;
    uint64_t fingerprint = 0;            // of what was stored, when hunting
  };
  using ItemPointer = std::shared_ptr<Item>;
  using Lock = std::unique_lock<std::mutex>;

  struct PlannedSlot {
    int64_t offset, bytes;
    ItemPointer holder;
  };

  void end_threads();
  ItemPointer find(int64_t item) const;
  void wait_for_queue(Lock& lock, int64_t bytes);
  bool find_place(Lock& lock, Item& item, int64_t tier);
  void vacate(Lock& lock, int64_t slot);
  void return_place(Item& item);
  void poison(Tier& tier, int64_t offset, int64_t bytes);
  void drop_sources(Item& item);
  // The same if the item is written and nobody needs the sources.
  void drop_if_idle(Item& item);
  // Frees the sources of finished writes; call without the lock.
  void drop_finished();
  void start_reading(const ItemPointer& item, bool urgent);
  // Returns the buffer that was held for the last reservation, to be let go without the lock.
  std::shared_ptr<Buffer> end_reservation(const ItemPointer& item);
  // The source that is the whole block by itself.
  static std::optional<torch::stable::Tensor> whole_block(const Item& item);

  // engine_workers.cpp
  void work(int64_t worker);
  void run_write(Lock& lock, const ItemPointer& item, std::mt19937_64& random);
  void run_read(Lock& lock, const ItemPointer& item, std::mt19937_64& random);
  void run_spill(Lock& lock, const ItemPointer& item, std::mt19937_64& random);
  bool can_spill(const Item& item) const;
  void start_spills();
  void end_spill(Item& item);
  void cancel_spill(const ItemPointer& item);
  void fill_gaps(const Item& item, char* block) const;
  // Of the pieces where they are now, or in a block that was read.
  static uint64_t fingerprint(const std::vector<Piece>& pieces, const char* block = nullptr);
  void pause(std::mt19937_64& random) const;
  bool hunting() const { return options_.delay_seed >= 0; }

  const std::vector<std::unique_ptr<Tier>> tiers_;
  const Options options_;
  const std::shared_ptr<BufferPool> buffers_;
  Link link_;

  mutable std::mutex mutex_;
  std::condition_variable work_arrived_, work_ended_;
  std::map<int64_t, ItemPointer> items_;  // oldest first
  std::vector<PlannedSlot> planned_;
  std::deque<ItemPointer> writes_, reads_, spills_;
  std::vector<torch::stable::Tensor> finished_;
  int64_t next_item_ = 1, queued_bytes_ = 0, spilling_bytes_ = 0, active_ = 0;
  bool stopping_ = false, file_full_ = false;
  std::string failure_;

  int64_t written_ = 0, written_bytes_ = 0, read_ = 0, read_bytes_ = 0, forwarded_ = 0, forwarded_bytes_ = 0;
  int64_t spilled_ = 0, spilled_bytes_ = 0, planned_bytes_ = 0, planned_block_bytes_ = 0;
  double load_seconds_ = 0, store_seconds_ = 0;
  std::vector<std::thread> workers_;
};

// Erases the first such value from a queue; false if there is none.
template <class Queue, class Value>
bool erase_from(Queue& queue, const Value& value) {
  const auto found = std::find(queue.begin(), queue.end(), value);
  if (found == queue.end()) return false;
  queue.erase(found);
  return true;
}

}  // namespace pykern
