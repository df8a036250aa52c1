#include "offload/engine.h"

#include <torch/csrc/stable/ops.h>

#include <chrono>
#include <stdexcept>
#include <system_error>

namespace pykern {

using torch::stable::Tensor;

namespace {

using Clock = std::chrono::steady_clock;

constexpr const char* kReleased = "offload: the saved tensor was released before its use";

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

}  // namespace

Engine::Engine(std::vector<std::unique_ptr<Tier>> tiers, const Options& options)
    : tiers_(std::move(tiers)),
      options_(options),
      buffers_(std::make_shared<BufferPool>(options.buffer_bytes, options.delay_seed >= 0)),
      link_(options.link) {
  const int64_t threads = std::max<int64_t>(options.threads, link_.has_two_directions() ? 2 : 1);
  try {
    for (int64_t worker = 0; worker < threads; ++worker) workers_.emplace_back([this, worker] { work(worker); });
  } catch (const std::system_error& error) {
    end_threads();
    throw std::runtime_error("threads: the system gives " + std::to_string(workers_.size()) + " of " +
                             std::to_string(threads) + ": " + error.code().message() + "; ask for fewer");
  }
}

Engine::~Engine() { end_threads(); }

void Engine::end_threads() {
  {
    const Lock lock(mutex_);
    stopping_ = true;
  }
  work_arrived_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

std::string Engine::lay_out(const std::vector<int64_t>& slot_bytes) {
  const Lock lock(mutex_);
  std::vector<int64_t> offsets;
  const std::string error = tiers_.front()->lay_out(slot_bytes, offsets);
  if (!error.empty()) return error;
  for (size_t slot = 0; slot < offsets.size(); ++slot) planned_.push_back({offsets[slot], slot_bytes[slot], nullptr});
  return "";
}

std::string Engine::preallocate(int64_t bytes) {
  const Lock lock(mutex_);
  return tiers_.back()->preallocate(bytes);
}

// --- out ------------------------------------------------------------------------------------------

int64_t Engine::store(std::vector<Tensor> sources, std::vector<Piece> pieces, int64_t bytes, int64_t slot,
                      int64_t tier) {
  drop_finished();
  const auto item = std::make_shared<Item>();
  if (hunting()) item->fingerprint = fingerprint(pieces);
  item->bytes = bytes;
  item->slot = slot;
  Lock lock(mutex_);
  wait_for_queue(lock, bytes);
  if (!find_place(lock, *item, tier)) return -1;
  item->sources = std::move(sources);
  item->pieces = std::move(pieces);
  item->number = next_item_++;
  if (slot >= 0) planned_[slot].holder = item;
  items_.emplace(item->number, item);
  writes_.push_back(item);
  queued_bytes_ += bytes;
  start_spills();
  work_arrived_.notify_all();
  return item->number;
}

void Engine::wait_for_queue(Lock& lock, int64_t bytes) {
  const auto has_room = [&] { return queued_bytes_ == 0 || queued_bytes_ + bytes <= options_.queue_bytes; };
  if (has_room()) return;
  const auto begin = Clock::now();
  while (!has_room()) {
    work_ended_.wait(lock);
    lock.unlock();
    drop_finished();
    lock.lock();
  }
  store_seconds_ += seconds_since(begin);
}

bool Engine::find_place(Lock& lock, Item& item, int64_t tier) {
  if (item.slot >= 0) {
    if (item.slot >= static_cast<int64_t>(planned_.size())) {
      throw std::runtime_error("offload: there is no slot " + std::to_string(item.slot) + ", only " +
                               std::to_string(planned_.size()) + " were planned");
    }
    PlannedSlot& place = planned_[item.slot];
    if (item.bytes > place.bytes) {
      throw std::runtime_error("offload: a block of " + std::to_string(item.bytes) + " bytes does not fit into slot " +
                               std::to_string(item.slot) + " of " + std::to_string(place.bytes));
    }
    vacate(lock, item.slot);
    item.tier = tiers_.front().get();
    if (item.tier->failed) return false;
    item.offset = place.offset;
    item.tier->slots().account(item.tier->slots().rounded(place.bytes), true);
    planned_bytes_ += place.bytes;
    planned_block_bytes_ += item.bytes;
    return true;
  }
  for (int64_t index = 0; index < static_cast<int64_t>(tiers_.size()); ++index) {
    if ((tier >= 0 && tier != index) || tiers_[index]->failed) continue;
    item.tier = tiers_[index].get();
    item.offset = item.tier->take(item.bytes, failure_);
    if (item.offset >= 0) return true;
  }
  return false;
}

// Once an item is back in a buffer, or was never written, its slot is not needed any more, although
// the item may live on.
void Engine::vacate(Lock& lock, int64_t slot) {
  std::optional<Clock::time_point> begin;
  while (const ItemPointer holder = planned_[slot].holder) {
    if (holder->stored && !holder->buffer) holder->buffer = holder->shared.lock();
    if (holder->active == 0 && holder->failed) {
      return_place(*holder);
    } else if (holder->active == 0 && holder->stored && holder->buffer) {
      drop_sources(*holder);
      ++holder->reservations;  // for good: the buffer is all there is
      return_place(*holder);
    } else if (!holder->error.empty()) {
      throw std::runtime_error("offload: slot " + std::to_string(slot) + " still holds item " +
                               std::to_string(holder->number) + ", which can't be brought back: " + holder->error);
    } else {
      if (holder->reading && erase_from(reads_, holder)) reads_.push_front(holder);
      if (!holder->released && holder->reservations > 0 && !holder->reading && !holder->buffer) {
        start_reading(holder, true);
      }
      if (!holder->released && holder->reservations == 0 && holder->active == 0) {
        throw std::runtime_error("offload: slot " + std::to_string(slot) + " still belongs to item " +
                                 std::to_string(holder->number) + ", which was neither released nor reserved");
      }
      if (!begin) begin = Clock::now();
      work_ended_.wait(lock);
    }
  }
  if (begin) store_seconds_ += seconds_since(*begin);
}

bool Engine::settle(int64_t number) {
  bool stored;
  {
    Lock lock(mutex_);
    const ItemPointer item = find(number);
    // Somebody waits for this one: ahead of what was queued before it.
    if (erase_from(writes_, item)) writes_.push_front(item);
    const auto settled = [&] {
      return item->released || item->failed || (item->stored && (!item->held || item->active == 0));
    };
    if (!settled()) {
      const auto begin = Clock::now();
      work_ended_.wait(lock, settled);
      store_seconds_ += seconds_since(begin);
    }
    stored = item->stored;
    if (stored && item->held && !item->released) {
      drop_sources(*item);
      if (item->reservations > 0 && !item->buffer && !item->reading) start_reading(item, false);
    }
  }
  drop_finished();
  return stored;
}

// --- back -----------------------------------------------------------------------------------------

void Engine::reserve(int64_t number) {
  const Lock lock(mutex_);
  const ItemPointer item = find(number);
  ++item->reservations;
  cancel_spill(item);
  if (item->held || item->buffer || item->reading) return;
  item->buffer = item->shared.lock();
  if (!item->buffer) start_reading(item, false);
}

void Engine::start_reading(const ItemPointer& item, bool urgent) {
  item->reading = true;
  urgent ? reads_.push_front(item) : reads_.push_back(item);
  work_arrived_.notify_all();
}

void Engine::unreserve(int64_t number) {
  std::shared_ptr<Buffer> buffer;
  {
    const Lock lock(mutex_);
    buffer = end_reservation(find(number));
  }
  // The read that others waited for may have left the queue.
  work_ended_.notify_all();
  drop_finished();
}

Tensor Engine::load(int64_t number) {
  std::shared_ptr<Buffer> buffer, unused;
  std::optional<Tensor> whole;
  int64_t bytes;
  {
    Lock lock(mutex_);
    const ItemPointer item = find(number);
    bytes = item->bytes;
    ++item->reservations;
    cancel_spill(item);
    std::optional<Clock::time_point> begin;
    for (;;) {
      if (item->released) throw std::runtime_error(kReleased);
      if (item->held && (whole = whole_block(*item))) {
        ++forwarded_;
        forwarded_bytes_ += bytes;
        break;
      }
      if (!item->reading) {
        buffer = item->buffer ? item->buffer : item->shared.lock();
        if (buffer || !item->error.empty()) break;
        // Somebody waits for this one: ahead of what is only expected to be needed.
        start_reading(item, true);
      } else if (erase_from(reads_, item)) {
        reads_.push_front(item);
      }
      if (!begin) begin = Clock::now();
      work_ended_.wait(lock);
    }
    if (begin) load_seconds_ += seconds_since(*begin);
    unused = end_reservation(item);
    if (!whole && !buffer) {
      const std::string error = std::move(item->error);
      item->error.clear();
      throw std::runtime_error("offload: " + error);
    }
  }
  drop_finished();
  if (whole) return *whole;
  const int64_t size = bytes, stride = 1;
  return torch::stable::from_blob(
      buffer->data(), {&size, 1}, {&stride, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      torch::headeronly::ScalarType::Byte, [buffer](void*) mutable { buffer.reset(); });
}

std::optional<Tensor> Engine::whole_block(const Item& item) {
  for (const Tensor& source : item.sources) {
    if (source.numel() == item.bytes && item.bytes > 0) return source;
  }
  return std::nullopt;
}

void Engine::release(int64_t number) {
  std::shared_ptr<Buffer> buffer;
  {
    const Lock lock(mutex_);
    const auto found = items_.find(number);
    if (found == items_.end()) return;
    const ItemPointer item = std::move(found->second);
    items_.erase(found);
    item->released = true;
    buffer = std::move(item->buffer);
    cancel_spill(item);
    if (erase_from(writes_, item)) queued_bytes_ -= item->bytes;
    erase_from(reads_, item);
    if (item->active == 0) {
      drop_sources(*item);
      return_place(*item);
    }
  }
  work_ended_.notify_all();
  drop_finished();
}

void Engine::synchronize() {
  {
    Lock lock(mutex_);
    work_ended_.wait(lock, [&] { return writes_.empty() && reads_.empty() && spills_.empty() && active_ == 0; });
  }
  drop_finished();
}

// --- what is told ---------------------------------------------------------------------------------

std::string Engine::take_failure() {
  const Lock lock(mutex_);
  return std::exchange(failure_, "");
}

std::string Engine::description() const {
  std::string text = tiers_.front()->medium().description();
  if (tiers_.size() > 1) text += ", then " + tiers_.back()->medium().description();
  return text;
}

std::vector<double> Engine::counters() {
  const Lock lock(mutex_);
  int64_t slots = 0, peak_slots = 0, slot_bytes = 0, peak_slot_bytes = 0, extent = 0, growths = 0;
  for (const auto& tier : tiers_) {
    slots += tier->slots().count();
    peak_slots += tier->slots().peak_count();
    slot_bytes += tier->slots().used_bytes();
    peak_slot_bytes += tier->slots().peak_bytes();
    extent += tier->slots().extent();
    growths += tier->growths();
  }
  const int64_t file_bytes = tiers_.back()->medium().address(0) ? 0 : tiers_.back()->slots().used_bytes();
  std::vector<double> counters{load_seconds_, store_seconds_};
  for (const int64_t count : {written_, written_bytes_, read_, read_bytes_, forwarded_, forwarded_bytes_, slots,
                              peak_slots, slot_bytes, peak_slot_bytes, extent, growths, buffers_->allocations(),
                              spilled_, spilled_bytes_, file_bytes, planned_bytes_, planned_block_bytes_}) {
    counters.push_back(static_cast<double>(count));
  }
  return counters;
}

void Engine::reset_counters() {
  const Lock lock(mutex_);
  written_ = written_bytes_ = read_ = read_bytes_ = forwarded_ = forwarded_bytes_ = 0;
  spilled_ = spilled_bytes_ = planned_bytes_ = planned_block_bytes_ = 0;
  load_seconds_ = store_seconds_ = 0;
  for (const auto& tier : tiers_) tier->slots().reset_peaks();
}

// --- items ----------------------------------------------------------------------------------------

Engine::ItemPointer Engine::find(int64_t number) const {
  const auto found = items_.find(number);
  if (found == items_.end()) {
    throw std::runtime_error(kReleased);
  }
  return found->second;
}

void Engine::return_place(Item& item) {
  if (item.offset < 0) return;
  Slots& slots = item.tier->slots();
  if (item.slot >= 0) {
    PlannedSlot& place = planned_[item.slot];
    poison(*item.tier, place.offset, place.bytes);
    slots.account(slots.rounded(place.bytes), false);
    place.holder.reset();
  } else {
    poison(*item.tier, item.offset, item.bytes);
    item.tier->give(item.offset, item.bytes);
    if (item.tier == tiers_.back().get()) file_full_ = false;
  }
  item.offset = -1;
}

void Engine::drop_sources(Item& item) {
  for (Tensor& source : item.sources) finished_.push_back(std::move(source));
  item.sources.clear();
  item.held = false;
}

void Engine::drop_if_idle(Item& item) {
  if (item.stored && item.held && item.reservations == 0 && item.active == 0) drop_sources(item);
}

std::shared_ptr<Buffer> Engine::end_reservation(const ItemPointer& item) {
  if (--item->reservations > 0) return nullptr;
  if (erase_from(reads_, item)) item->reading = false;
  drop_if_idle(*item);
  return std::move(item->buffer);
}

void Engine::drop_finished() {
  std::vector<Tensor> finished;
  const Lock lock(mutex_);
  finished.swap(finished_);
}

}  // namespace pykern
