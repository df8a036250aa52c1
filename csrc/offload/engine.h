// Moves bytes between tensors and a medium on its own threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "offload/buffers.h"
#include "offload/medium.h"
#include "offload/slots.h"

namespace pykern {

// An item is a block of bytes, gathered from any number of tensors, its sources. Its life: queued
// with the sources held -> written, sources dropped -> reserved or loaded into a buffer any number
// of times -> released. While the sources are held, a load is answered from them: with the tensor
// itself if it is the whole block.
//
// Tensors are dropped by callers only, never by a worker: a tensor that Python knows needs the
// interpreter's lock to die, and a worker that waits for it could wait for ever.
class Engine {
 public:
  struct Options {
    int64_t limit = -1;         // largest extent; -1: as far as the medium grows
    int64_t growth = 0;         // the extent grows by at least this much
    int64_t threads = 2;
    int64_t queue_bytes = 0;    // sources held by unfinished writes, unless a single one is larger
    int64_t delay_seed = -1;    // >= 0: random pauses around each copy, and freed bytes are poisoned
  };

  Engine(std::unique_ptr<Medium> medium, const Options& options);
  ~Engine();

  // Makes room for `bytes` now; an empty string, or why that failed.
  std::string preallocate(int64_t bytes);
  // Starts writing a block. The pieces lie in the sources, are sorted and don't overlap; what lies
  // between them comes back undefined. Waits while the queue is full. Returns the item's number, or
  // -1 if there is no room or an earlier write failed: the caller keeps the tensors.
  int64_t store(std::vector<torch::stable::Tensor> sources, std::vector<Piece> pieces, int64_t bytes);
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
  std::string description() const { return medium_->description(); }
  // Writes, their bytes, reads, their bytes, forwards, their bytes, seconds that loads and stores
  // waited, slots, most slots, bytes in slots, most bytes in slots, extent.
  std::vector<double> counters();
  void reset_counters();

 private:
  struct Item {
    int64_t offset = 0, bytes = 0;
    std::vector<torch::stable::Tensor> sources;
    std::vector<Piece> pieces;           // what they point to is gone once the sources are dropped
    std::shared_ptr<Buffer> buffer;      // held for those who reserved
    std::weak_ptr<Buffer> shared;        // the same, or the one that a caller still uses
    int64_t reservations = 0;
    int64_t active = 0;                  // threads at work on it: one may write, and one gather
    bool held = true;                    // the sources are there
    bool stored = false, failed = false, reading = false, released = false;
    std::string error;
  };
  using ItemPointer = std::shared_ptr<Item>;
  using Lock = std::unique_lock<std::mutex>;

  void work(int64_t worker);
  void run_write(Lock& lock, const ItemPointer& item);
  void run_read(Lock& lock, const ItemPointer& item);
  void pause(std::mt19937_64& random) const;
  ItemPointer find(int64_t item) const;
  bool make_room(int64_t bytes, std::string& error);
  void return_slot(Item& item);
  void drop_sources(Item& item);
  // The same if the item is written and nobody needs the sources.
  void drop_if_idle(Item& item);
  void start_reading(const ItemPointer& item);
  // Returns the buffer that was held for the last reservation, to be let go without the lock.
  std::shared_ptr<Buffer> end_reservation(const ItemPointer& item);
  // The source that is the whole block by itself.
  static std::optional<torch::stable::Tensor> whole_block(const Item& item);
  void fill_gaps(const Item& item, char* block) const;
  // Frees the sources of finished writes; call without the lock.
  void drop_finished();

  const std::unique_ptr<Medium> medium_;
  const Options options_;
  const std::shared_ptr<BufferPool> buffers_;

  mutable std::mutex mutex_;
  std::condition_variable work_arrived_, work_ended_;
  Slots slots_;
  std::unordered_map<int64_t, ItemPointer> items_;
  std::deque<ItemPointer> writes_, reads_;
  std::vector<torch::stable::Tensor> finished_;
  int64_t next_item_ = 1, queued_bytes_ = 0, active_ = 0;
  bool stopping_ = false, write_failed_ = false;
  std::string failure_;

  int64_t written_ = 0, written_bytes_ = 0, read_ = 0, read_bytes_ = 0, forwarded_ = 0, forwarded_bytes_ = 0;
  double load_seconds_ = 0, store_seconds_ = 0;
  std::vector<std::thread> workers_;
};

}  // namespace pykern
