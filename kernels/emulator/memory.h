// What a kernel may touch: the tensors of the op at hand, and the shared memory of its block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pykern::emulator {

enum class Access {
  read,     // a kernel must leave it as it is
  write,    // a result: compared between thread orders
  scratch,  // read and written; nobody's result
};

// Announces `bytes` bytes of global memory to the launches that follow, until forget_all().
void announce(void* memory, int64_t bytes, Access access);
void forget_all();

// Fills memory with a pattern that is NaN in every floating type and -1 in every integer.
void poison(void* memory, size_t bytes);

struct Buffer {
  char* begin;
  char* end;
  Access access;
};

const std::vector<Buffer>& announced();

// Whether a kernel may read, or write, these bytes of global memory; else why not.
bool global_access_allowed(const void* address, size_t bytes, bool write);
std::string describe_global(const void* address, size_t bytes, bool write);

}  // namespace pykern::emulator
