#include "offload/channel.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <deque>
#include <random>

namespace pykern {
namespace {

class BlockingChannel : public Channel {
 public:
  explicit BlockingChannel(int file) : file_(file) {}

  void start(int number, const Transfer& transfer) override {
    const ssize_t moved = transfer.write ? pwrite(file_, transfer.data, transfer.bytes, transfer.offset)
                                         : pread(file_, transfer.data, transfer.bytes, transfer.offset);
    ended_.push_back({number, moved < 0 ? -errno : moved});
  }

  Ended wait() override {
    const Ended first = ended_.front();
    ended_.pop_front();
    return first;
  }

 private:
  const int file_;
  std::deque<Ended> ended_;
};

class FaultyChannel : public Channel {
 public:
  FaultyChannel(std::unique_ptr<Channel> channel, uint64_t seed) : channel_(std::move(channel)), random_(seed) {}

  void start(int number, const Transfer& transfer) override {
    if (random_() % 8 == 0) {
      interrupted_.push_back({number, random_() % 2 ? -EINTR : -EAGAIN});
      return;
    }
    Transfer cut = transfer;
    const int64_t pages = transfer.bytes / kPage;
    if (pages > 1 && random_() % 4 == 0) cut.bytes = (1 + static_cast<int64_t>(random_() % (pages - 1))) * kPage;
    channel_->start(number, cut);
  }

  Ended wait() override {
    if (interrupted_.empty()) return channel_->wait();
    const Ended first = interrupted_.front();
    interrupted_.pop_front();
    return first;
  }

 private:
  const std::unique_ptr<Channel> channel_;
  std::mt19937_64 random_;
  std::deque<Ended> interrupted_;
};

}  // namespace

std::unique_ptr<Channel> make_blocking_channel(int file) { return std::make_unique<BlockingChannel>(file); }

std::unique_ptr<Channel> make_faulty_channel(std::unique_ptr<Channel> channel, uint64_t seed) {
  return std::make_unique<FaultyChannel>(std::move(channel), seed);
}

}  // namespace pykern
