// What the engine's threads do.
#include <chrono>
#include <cstring>

#include "offload/engine.h"

namespace pykern {

void Engine::work(int64_t worker) {
  std::mt19937_64 random(static_cast<uint64_t>(options_.delay_seed) * 1000003u + static_cast<uint64_t>(worker));
  // A thread waits for the end of a modelled copy; copies the other way must not wait for the thread.
  const bool reader = !link_.has_two_directions() || worker % 2 == 1;
  const bool writer = !link_.has_two_directions() || worker % 2 == 0;
  Lock lock(mutex_);
  for (;;) {
    work_arrived_.wait(lock, [&] {
      return stopping_ || (reader && !reads_.empty()) || (writer && (!writes_.empty() || !spills_.empty()));
    });
    if (stopping_) return;
    const bool is_read = reader && !reads_.empty(), is_write = !is_read && !writes_.empty();
    std::deque<ItemPointer>& queue = is_read ? reads_ : is_write ? writes_ : spills_;
    const ItemPointer item = std::move(queue.front());
    queue.pop_front();
    ++item->active;
    ++active_;
    if (is_read) {
      run_read(lock, item, random);
    } else if (is_write) {
      run_write(lock, item, random);
    } else {
      run_spill(lock, item, random);
    }
    lock.unlock();
    pause(random);
    lock.lock();
    --item->active;
    --active_;
    if (!item->released) {
      drop_if_idle(*item);
    } else if (item->active == 0) {
      drop_sources(*item);
      return_place(*item);
    }
    start_spills();
    work_ended_.notify_all();
  }
}

void Engine::run_write(Lock& lock, const ItemPointer& item, std::mt19937_64& random) {
  lock.unlock();
  pause(random);
  const auto end = link_.book(false, item->bytes);
  const std::string error = item->tier->medium().write(item->offset, item->pieces);
  std::this_thread::sleep_until(end);
  lock.lock();
  queued_bytes_ -= item->bytes;
  if (error.empty()) {
    item->stored = true;
    ++written_;
    written_bytes_ += item->bytes;
  } else {
    // The sources stay where they are: nothing is lost, and nothing more is written there.
    item->failed = item->tier->failed = true;
    if (failure_.empty()) failure_ = error;
  }
}

void Engine::run_read(Lock& lock, const ItemPointer& item, std::mt19937_64& random) {
  const bool held = item->held;
  Medium& medium = item->tier->medium();
  const int64_t offset = item->offset;
  lock.unlock();
  pause(random);
  std::shared_ptr<Buffer> buffer = buffers_->take(item->bytes);
  std::string error;
  if (!buffer) {
    error = "no memory to bring back " + std::to_string(item->bytes) + " bytes";
  } else if (held) {
    for (const Piece& piece : item->pieces) std::memcpy(buffer->data() + piece.offset, piece.data, piece.bytes);
  } else {
    const auto end = link_.book(true, item->bytes);
    error = medium.read(offset, buffer->data(), item->bytes);
    std::this_thread::sleep_until(end);
  }
  if (error.empty() && hunting()) {
    fill_gaps(*item, buffer->data());
    if (fingerprint(item->pieces, buffer->data()) != item->fingerprint) {
      error = "item " + std::to_string(item->number) + " is not what was stored: its parts changed before they were "
              "written, or somebody else wrote into its slot";
    }
  }
  lock.lock();
  item->reading = false;
  if (error.empty()) {
    (held ? forwarded_ : read_) += 1;
    (held ? forwarded_bytes_ : read_bytes_) += item->bytes;
    item->shared = buffer;
    if (item->reservations > 0) item->buffer = std::move(buffer);
  } else {
    item->error = error;
  }
}

// --- from memory to the file ----------------------------------------------------------------------

bool Engine::can_spill(const Item& item) const {
  return item.tier == tiers_.front().get() && item.slot < 0 && item.stored && !item.held && !item.spilling &&
         !item.reading && item.active == 0 && item.reservations == 0 && item.shared.expired();
}

// Begins above seven eighths of the memory's limit, and goes on until a quarter is free.
void Engine::start_spills() {
  if (tiers_.size() < 2 || tiers_.back()->failed || file_full_) return;
  Tier& memory = *tiers_.front();
  int64_t used = memory.slots().used_bytes() - spilling_bytes_;
  if (used <= memory.limit() / 8 * 7) return;
  for (const auto& [number, item] : items_) {
    if (used <= memory.limit() / 4 * 3) break;
    if (!can_spill(*item)) continue;
    const int64_t bytes = memory.slots().rounded(item->bytes);
    item->spilling = true;
    spills_.push_back(item);
    spilling_bytes_ += bytes;
    used -= bytes;
  }
  work_arrived_.notify_all();
}

void Engine::cancel_spill(const ItemPointer& item) {
  if (item->spilling && erase_from(spills_, item)) end_spill(*item);
}

void Engine::end_spill(Item& item) {
  item.spilling = false;
  spilling_bytes_ -= tiers_.front()->slots().rounded(item.bytes);
}

void Engine::run_spill(Lock& lock, const ItemPointer& item, std::mt19937_64& random) {
  Tier &memory = *tiers_.front(), &file = *tiers_.back();
  // Whole pages, so that everything is written from where it lies.
  const int64_t bytes = memory.slots().rounded(item->bytes);
  const int64_t target = file.failed ? -1 : file.take(item->bytes, failure_);
  if (target < 0) {
    file_full_ = true;
    end_spill(*item);
    return;
  }
  const char* source = memory.medium().address(item->offset);
  lock.unlock();
  pause(random);
  const std::string error = file.medium().write(target, {{0, bytes, source}});
  lock.lock();
  end_spill(*item);
  if (!error.empty()) {
    file.failed = true;
    if (failure_.empty()) failure_ = error;
  }
  if (!error.empty() || item->released || item->reading || item->reservations > 0 || !item->shared.expired()) {
    // Wanted meanwhile, or not needed any more: it stays where it is.
    poison(file, target, item->bytes);
    file.give(target, item->bytes);
    return;
  }
  poison(memory, item->offset, item->bytes);
  memory.give(item->offset, item->bytes);
  item->tier = &file;
  item->offset = target;
  ++spilled_;
  spilled_bytes_ += item->bytes;
}

// --- hunting --------------------------------------------------------------------------------------

void Engine::poison(Tier& tier, int64_t offset, int64_t bytes) {
  if (!hunting() || tier.failed) return;
  const std::vector<char> bad(tier.slots().rounded(bytes), kPoison);
  tier.medium().write(offset, {{0, static_cast<int64_t>(bad.size()), bad.data()}});
}

void Engine::fill_gaps(const Item& item, char* block) const {
  int64_t filled = 0;
  for (const Piece& piece : item.pieces) {
    std::memset(block + filled, kPoison, piece.offset - filled);
    filled = piece.end();
  }
  std::memset(block + filled, kPoison, item.bytes - filled);
}

uint64_t Engine::fingerprint(const std::vector<Piece>& pieces, const char* block) {
  uint64_t value = 0;
  for (const Piece& piece : pieces) {
    const char* data = block ? block + piece.offset : piece.data;
    for (int64_t index = 0; index < piece.bytes; ++index) {
      value = (value ^ static_cast<unsigned char>(data[index])) * uint64_t{0x100000001b3};
    }
  }
  return value;
}

void Engine::pause(std::mt19937_64& random) const {
  if (!hunting()) return;
  std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
}

}  // namespace pykern
