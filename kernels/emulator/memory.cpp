// Global memory: the announced buffers. Shared memory: a record of the last accesses of every byte.
#include "kernels/emulator/memory.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>

#include "kernels/emulator/state.h"

namespace pykern::emulator {
namespace {

std::vector<Buffer> buffers;

struct Image {
  uintptr_t base = 0, begin = ~uintptr_t{0}, end = 0;
  std::string path;
};

// This module in memory: constant tables of kernels lie in it.
const Image& own_image() {
  static const Image image = [] {
    Image found;
    Dl_info own{};
    dladdr(reinterpret_cast<const void*>(&announced), &own);
    found.path = own.dli_fname;
    found.base = reinterpret_cast<uintptr_t>(own.dli_fbase);
    dl_iterate_phdr(
        [](dl_phdr_info* object, size_t, void* context) {
          auto* into = static_cast<Image*>(context);
          uintptr_t begin = ~uintptr_t{0}, end = 0;
          for (int i = 0; i < object->dlpi_phnum; ++i) {
            const auto& segment = object->dlpi_phdr[i];
            if (segment.p_type != PT_LOAD) continue;
            begin = std::min<uintptr_t>(begin, object->dlpi_addr + segment.p_vaddr);
            end = std::max<uintptr_t>(end, object->dlpi_addr + segment.p_vaddr + segment.p_memsz);
          }
          const auto here = reinterpret_cast<uintptr_t>(&buffers);
          if (here < begin || here >= end) return 0;
          into->begin = begin;
          into->end = end;
          return 1;
        },
        &found);
    return found;
  }();
  return image;
}

const char* verb(AccessKind kind) {
  return kind == AccessKind::read ? "read" : kind == AccessKind::write ? "write" : "atomic";
}

[[noreturn]] void report_race(const SharedObject& object, size_t offset, AccessKind kind, const char* earlier,
                              Actor other, const void* return_address) {
  fail(text("race in shared memory: %s of byte %zu of %zu, after a %s by %s with no barrier between", verb(kind),
            offset, object.bytes, earlier, actor_name(other).c_str()),
       return_address);
}

}  // namespace

bool happened_before(const Thread& thread, Actor actor, uint32_t time) {
  return actor == 0 || actor == thread.actor() || thread.clock.seen[clock_of(actor)] >= time;
}

std::string actor_name(Actor actor) {
  if (actor < kFirstMbarrier) return text("thread %d", actor - 1);
  if (actor < kFirstWarpgroup) return "a bulk copy whose mbarrier was not waited for";
  return text("wgmma of warpgroup %d", actor - kFirstWarpgroup);
}

void announce(void* memory, int64_t bytes, Access access) {
  if (bytes > 0) buffers.push_back({static_cast<char*>(memory), static_cast<char*>(memory) + bytes, access});
}

void forget_all() { buffers.clear(); }

void poison(void* memory, size_t bytes) {
  if (bytes > 0) std::memset(memory, 0xff, bytes);
}

const std::vector<Buffer>& announced() { return buffers; }

bool global_access_allowed(const void* address, size_t bytes, bool write) {
  const char *begin = static_cast<const char*>(address), *end = begin + bytes;
  for (const Buffer& buffer : buffers) {
    if (begin >= buffer.begin && end <= buffer.end && !(write && buffer.access == Access::read)) return true;
  }
  const Image& image = own_image();
  const auto at = reinterpret_cast<uintptr_t>(address);
  return !write && at >= image.begin && at + bytes <= image.end;
}

std::string describe_global(const void* address, size_t bytes, bool write) {
  const char* begin = static_cast<const char*>(address);
  const Buffer* nearest = nullptr;
  int64_t nearest_distance = 0;
  for (const Buffer& buffer : buffers) {
    if (begin >= buffer.begin && begin + bytes <= buffer.end) {
      return text("%s of %zu bytes at byte %lld of an input that kernels may only read", write ? "write" : "read",
                  bytes, static_cast<long long>(begin - buffer.begin));
    }
    const int64_t distance = begin < buffer.begin ? buffer.begin - begin : begin + bytes - buffer.end;
    if (!nearest || distance < nearest_distance) {
      nearest = &buffer;
      nearest_distance = distance;
    }
  }
  std::string report = text("%s of %zu bytes outside all memory of this op", write ? "write" : "read", bytes);
  if (nearest) {
    report += text(": %lld bytes %s buffer %zu, which has %lld bytes", static_cast<long long>(nearest_distance),
                   begin < nearest->begin ? "before" : "past the end of", static_cast<size_t>(nearest - buffers.data()),
                   static_cast<long long>(nearest->end - nearest->begin));
  }
  return report;
}

std::string source_place(const void* address) {
  const Image& image = own_image();
  // The instruction before the one to return to.
  const unsigned long long offset = reinterpret_cast<uintptr_t>(address) - image.base - 1;
  const std::string command = text("addr2line -Cfpie '%s' 0x%llx 2>/dev/null", image.path.c_str(), offset);
  std::string place;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char line[512];
    while (fgets(line, sizeof(line), pipe)) place += line;
    pclose(pipe);
  }
  while (!place.empty() && place.back() == '\n') place.pop_back();
  for (char& letter : place) letter = letter == '\n' ? ';' : letter;
  return place.empty() ? text("%s+0x%llx", image.path.c_str(), offset) : place;
}

SharedObject* shared_object(Block& block, const void* address) {
  for (SharedObject& object : block.shared) {
    if (address >= object.memory && address < object.memory + object.bytes) return &object;
  }
  return nullptr;
}

bool in_shared(const void* address, size_t bytes) {
  const SharedObject* object = shared_object(*current->block, address);
  return object && static_cast<const char*>(address) + bytes <= object->memory + object->bytes;
}

void check_shared(SharedObject& object, size_t offset, size_t bytes, AccessKind kind, const void* return_address) {
  if (offset + bytes > object.bytes) {
    fail(text("%s of %zu bytes at byte %zu of a shared object of %zu bytes", verb(kind), bytes, offset, object.bytes),
         return_address);
  }
  const Thread& thread = *current;
  const Actor self = thread.actor();
  const uint32_t now = current->clock.now;
  for (size_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = object.cells[i];
    if (cell.filling) {
      fail(text("%s of byte %zu of a shared object that an asynchronous copy has not filled yet", verb(kind), i),
           return_address);
    }
    if (cell.opaque) {
      fail(text("%s of byte %zu of a shared object, part of an mbarrier", verb(kind), i), return_address);
    }
    if (cell.reading && kind != AccessKind::read) {
      fail(text("%s of byte %zu of a shared object that a copy or a wgmma under way still reads", verb(kind), i),
           return_address);
    }
    const bool both_atomic = kind == AccessKind::atomic && cell.atomic;
    if (!both_atomic && !happened_before(thread, cell.writer, cell.write_time)) {
      report_race(object, i, kind, cell.atomic ? "atomic" : "write", cell.writer, return_address);
    }
    if (kind == AccessKind::read) {
      if (cell.reader == self || happened_before(thread, cell.reader, cell.read_time)) {
        cell.reader = self;
        cell.read_time = now;
      } else {
        cell.other_reader = self;
        cell.other_read_time = now;
      }
      continue;
    }
    if (!happened_before(thread, cell.reader, cell.read_time)) {
      report_race(object, i, kind, "read", cell.reader, return_address);
    }
    if (!happened_before(thread, cell.other_reader, cell.other_read_time)) {
      report_race(object, i, kind, "read", cell.other_reader, return_address);
    }
    cell.writer = self;
    cell.write_time = now;
    cell.atomic = kind == AccessKind::atomic;
    cell.reader = cell.other_reader = 0;
  }
}

void check_access(const void* address, size_t bytes, AccessKind kind, const void* return_address) {
  if (!current) return;
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    fail(text("misaligned %s of %zu bytes: the address is %zu past a multiple", verb(kind), bytes,
              static_cast<size_t>(reinterpret_cast<uintptr_t>(address) % bytes)),
         return_address);
  }
#ifdef PYKERN_EMULATOR_CHECKED
  if (current->fiber.holds(address)) return;
  if (SharedObject* object = shared_object(*current->block, address)) {
    check_shared(*object, static_cast<size_t>(static_cast<const char*>(address) - object->memory), bytes, kind,
                 return_address);
    return;
  }
  const bool write = kind != AccessKind::read;
  if (global_access_allowed(address, bytes, write)) return;
  for (const SharedObject& object : current->block->shared) {
    const auto past = static_cast<const char*>(address) - (object.memory + object.bytes);
    if (past >= 0 && past < static_cast<std::ptrdiff_t>(kNearBytes)) {
      fail(text("%s of %zu bytes, %zu bytes past the end of a shared object of %zu bytes", verb(kind), bytes,
                static_cast<size_t>(past), object.bytes),
           return_address);
    }
  }
  fail(describe_global(address, bytes, write), return_address);
#endif
}

}  // namespace pykern::emulator
