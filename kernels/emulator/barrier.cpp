// Barriers of a block, meetings of a warp, and what threads know of each other after them.
#include <algorithm>

#include "kernels/emulator/state.h"

namespace pykern::emulator {
namespace {

void merge(uint32_t* seen, const Thread& thread) {
  const int clocks = clocks_in_use(*thread.block);
  for (int i = 0; i < clocks; ++i) seen[i] = std::max(seen[i], thread.clock.seen[i]);
  seen[thread.warp()] = std::max(seen[thread.warp()], thread.clock.now);
}

// The thread has synchronised with all that `seen` tells of; what it does next is newer.
void advance(Thread& thread, const uint32_t* seen) {
  std::copy(seen, seen + clocks_in_use(*thread.block), thread.clock.seen);
  thread.clock.now = seen[thread.warp()] + 1;
}

void arrive(Barrier& barrier, int expected, Site site, const char* what) {
  const bool for_all = expected == 0;
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.for_all = for_all;
    barrier.site = site;
    std::fill(barrier.seen, barrier.seen + kClocks, 0u);
  } else if (barrier.for_all != for_all || barrier.expected != expected) {
    fail(text("threads expect %d and %d others at one barrier", barrier.expected, expected));
  } else if (for_all && barrier.site.line != site.line) {
    fail(text("divergent barrier: threads of one block meet at %s:%d and %s:%d in %s", barrier.site.file,
              barrier.site.line, site.file, site.line, what));
  }
  ++barrier.arrived;
  ++machine.events;
  merge(barrier.seen, *current);
}

void complete(Block& block, Barrier& barrier) {
  const int expected = barrier.for_all ? block.live : barrier.expected;
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  if (barrier.arrived > expected) fail(text("%d threads arrived at a barrier for %d", barrier.arrived, expected));
  if (&barrier == &block.barriers[0]) {
    block.vote_result = block.votes * 2 + block.vote_all;
    block.votes = 0;
    block.vote_all = true;
  }
  for (Thread* thread : barrier.waiting) {
    advance(*thread, barrier.seen);
    thread->barrier = -1;
    wake(thread);
  }
  barrier.waiting.clear();
  barrier.arrived = 0;
}

Barrier& barrier_of(int number) {
  if (number < 0 || number >= kBarriers) fail(text("barrier %d: a block has %d", number, kBarriers));
  return current->block->barriers[number];
}

}  // namespace

void released(Thread& thread) {
  const uint32_t newer = thread.clock.now + 1;
  const auto& threads = thread.block->threads;
  const size_t first = static_cast<size_t>(thread.warp()) * 32, end = std::min(first + 32, threads.size());
  for (size_t i = first; i < end; ++i) threads[i]->clock.now = std::max(threads[i]->clock.now, newer);
}

void wait_barrier(int number, int expected, Site site, const char* what) {
  Thread* self = current;
  Barrier& barrier = barrier_of(number);
  if (expected % 32) fail(text("a barrier for %d threads: expected a multiple of the warp size", expected));
  arrive(barrier, expected, site, what);
  barrier.waiting.push_back(self);
  self->state = Thread::waiting;
  self->what = what;
  self->site = site;
  self->barrier = number;
  complete(*self->block, barrier);
  self->fiber.suspend();
}

void arrive_barrier(int number, int expected, Site site) {
  Thread* self = current;
  Barrier& barrier = barrier_of(number);
  arrive(barrier, expected, site, "barrier.arrive");
  released(*self);
  complete(*self->block, barrier);
}

int block_vote(int kind, int predicate, Site site) {
  Block& block = *current->block;
  block.votes += predicate != 0;
  block.vote_all = block.vote_all && predicate;
  wait_barrier(0, 0, site, kind == 0 ? "__syncthreads_or" : kind == 1 ? "__syncthreads_and" : "__syncthreads_count");
  const int64_t count = block.vote_result / 2, all = block.vote_result % 2;
  return kind == 0 ? count > 0 : kind == 1 ? static_cast<int>(all) : static_cast<int>(count);
}

namespace {

unsigned alive_lanes(const Block& block, int warp) {
  unsigned alive = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const size_t number = static_cast<size_t>(warp) * 32 + lane;
    if (number < block.threads.size() && block.threads[number]->state != Thread::done) alive |= 1u << lane;
  }
  return alive;
}

void complete_meetings(Block& block, int warp) {
  auto& meetings = block.meetings[warp];
  for (size_t i = 0; i < meetings.size();) {
    Meeting& meeting = meetings[i];
    if (meeting.expected != meeting.arrived) {
      ++i;
      continue;
    }
    if (meeting.combine) {
      // It looks into the stacks of all lanes, which only the machine may.
      Thread* self = current;
      current = nullptr;
      meeting.combine(meeting.brought, meeting.arrived, meeting.context);
      current = self;
    }
    if (meeting.orders_memory) {
      uint32_t seen[kClocks] = {};
      for (int lane = 0; lane < 32; ++lane) {
        if (meeting.arrived >> lane & 1) merge(seen, *block.threads[warp * 32 + lane]);
      }
      for (int lane = 0; lane < 32; ++lane) {
        if (meeting.arrived >> lane & 1) advance(*block.threads[warp * 32 + lane], seen);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (meeting.arrived >> lane & 1) wake(block.threads[warp * 32 + lane]);
    }
    meetings.erase(meetings.begin() + static_cast<std::ptrdiff_t>(i));
    ++machine.events;
  }
}

}  // namespace

void meet(unsigned mask, void* brought, Combine combine, void* context, const char* what, Site site,
          bool orders_memory) {
  Thread* self = current;
  const int lane = self->lane();
  if (!(mask >> lane & 1)) {
    fail(text("%s (%s:%d): lane %d calls with mask 0x%08x, which lacks it", what, site.file, site.line, lane, mask));
  }
  auto& meetings = self->block->meetings[self->warp()];
  auto meeting = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& other) {
    return other.mask == mask && !(other.arrived >> lane & 1);
  });
  if (meeting == meetings.end()) {
    // Lanes that had exited before are excused.
    const unsigned expected = mask & alive_lanes(*self->block, self->warp());
    meetings.push_back({mask, expected, 0, what, site, {}, combine, context, orders_memory});
    meeting = meetings.end() - 1;
  } else if (meeting->site.line != site.line || meeting->what != what) {
    fail(text("lanes of mask 0x%08x meet in different operations: %s (%s:%d) and %s (%s:%d)", mask, meeting->what,
              meeting->site.file, meeting->site.line, what, site.file, site.line));
  }
  meeting->arrived |= 1u << lane;
  meeting->brought[lane] = brought;
  self->state = Thread::waiting;
  self->what = what;
  self->site = site;
  self->mask = mask;
  complete_meetings(*self->block, self->warp());
  self->fiber.suspend();
}

void thread_exited(Thread* thread) {
  Block& block = *thread->block;
  --block.live;
  ++machine.events;
  if (block.live > 0) complete(block, block.barriers[0]);
  for (const Meeting& meeting : block.meetings[thread->warp()]) {
    if (meeting.expected >> thread->lane() & 1) {
      fail(text("lane %d exits, but mask 0x%08x of %s (%s:%d), where others wait, names it", thread->lane(),
                meeting.mask, meeting.what, meeting.site.file, meeting.site.line));
    }
  }
}

}  // namespace pykern::emulator
