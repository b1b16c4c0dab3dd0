// What the emulator's files share: emulator.cpp launches blocks and gives their threads turns, fiber.cpp goes from one
// thread to another, device.cpp is what kernels call. They are compiled without ThreadSanitizer (their own bookkeeping
// isn't the kernels'), which is told of threads by hand.
#pragma once
#include <deque>
#include <string>
#include <vector>

#include "emulator.h"

// Present under a sanitizer, else null.
extern "C" {
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned) __attribute__((weak));
void __tsan_switch_to_fiber(void*, unsigned) __attribute__((weak));
void __tsan_acquire(void*) __attribute__((weak));
void __tsan_release(void*) __attribute__((weak));
void __sanitizer_start_switch_fiber(void**, const void*, size_t) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) __attribute__((weak));
}

namespace emulator {

constexpr int warp_lanes = 32;

struct Place {
  const char* file = "";
  int line = 0;
  bool operator!=(const Place& o) const { return line != o.line || strcmp(file, o.file) != 0; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

// Where threads meet: all have to come, from the same place. Everything twice, for two generations, since a fast thread
// may be back before a slow one has left.
struct Meeting {
  uint64_t generation = 0;
  int arrived = 0;
  unsigned mask = 0;
  Place place;
  int sum[2] = {};
  uint64_t value[2][warp_lanes] = {};
  Fragments fragments[2][warp_lanes] = {};
  char order[2] = {};  // what ThreadSanitizer acquires and releases
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool keep;
};

// One of the blocks that run together: a cluster's, or one alone.
struct Block {
  Meeting meeting;
  std::vector<Meeting> warps;
  char* memory = nullptr;
  char* dynamic = nullptr;
  int ended = 0;            // threads that have
  uint64_t read_until = 0;  // cluster barriers that must have passed before its memory may go
};

struct Fiber : Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* tsan = nullptr;
  // in the block; the block's in the cluster
  int index = 0;
  int rank = 0;
  bool done = false;
  bool arrived = false;            // at the cluster's barrier, and hasn't waited
  uint64_t ticket = 0;             // for this generation of it
  const Meeting* waits = nullptr;  // for this meeting's generation to pass
  uint64_t generation = 0;
  Place place;
  std::vector<Copy> open;                // copies that aren't committed
  std::deque<std::vector<Copy>> groups;  // committed, not waited for
};

struct Stop {};  // unwinds the fibers after an error

// Of the launch that runs.
extern int threads;                // of a block
extern std::vector<Block> blocks;  // that run together
extern Meeting cluster_meeting;
extern Fiber* running;
extern std::string error;  // what went wrong first

[[noreturn]] void fail(const std::string& what);
void run_thread();  // the kernel, in the fiber that runs

void become_scheduler();     // the caller is it
void prepare(Fiber& fiber);  // to begin with run_thread when it is switched to
void to_fiber(Fiber& fiber);
void to_scheduler(bool last = false);  // last: the fiber has ended

}  // namespace emulator
