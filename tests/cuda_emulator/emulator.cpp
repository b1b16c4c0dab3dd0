// The scheduler. Compiled without ThreadSanitizer (its own bookkeeping isn't the kernels'), and told of by hand.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#error "the emulator switches fibers on x86-64 only"
#endif

// Present under a sanitizer, else null.
extern "C" {
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned) __attribute__((weak));
void __tsan_switch_to_fiber(void*, unsigned) __attribute__((weak));
void __tsan_acquire(void*) __attribute__((weak));
void __tsan_release(void*) __attribute__((weak));
void __sanitizer_start_switch_fiber(void**, const void*, size_t) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) __attribute__((weak));

// Saves the registers that a call keeps, on the old stack, and takes them from the new one.
void mmk_switch_stack(void** save, void* load);
}
asm(R"(
.text
.globl mmk_switch_stack
.hidden mmk_switch_stack
mmk_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace emulator {

Config config;
Counts counts;
Thread* current;

void copy_bytes(void* to, const void* from, int bytes);  // copy.cpp: what the sanitizers are to see
void read_halves(uint16_t* to, const void* const* rows, const int* at, int count);

namespace {

constexpr size_t stack_bytes = 256 << 10, guard_bytes = 4096;
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

std::deque<Fiber> fibers;
std::vector<Block> blocks;
Meeting cluster_meeting;
Fiber* running;
int threads;
void (*kernel_body)(void*);
void* kernel_context;
std::string error;

void* main_stack_pointer;
void* main_tsan;
void* main_fake_stack;
const void* main_stack;
size_t main_stack_bytes;
char start_order, end_order;

void fail(const std::string& what) {
  if (error.empty())
    error = "block (" + std::to_string(running->block.x) + ", " + std::to_string(running->block.y) + "): " + what;
  throw Stop();
}

void to_scheduler(bool last) {
  Fiber* self = running;
  void* fake = nullptr;
  if (__tsan_switch_to_fiber)
    __tsan_switch_to_fiber(main_tsan, 1);  // 1: without synchronising
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, main_stack, main_stack_bytes);
  mmk_switch_stack(&self->stack_pointer, main_stack_pointer);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void to_fiber(Fiber& f) {
  running = &f;
  current = &f;
  if (__tsan_switch_to_fiber)
    __tsan_switch_to_fiber(f.tsan, 1);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&main_fake_stack, f.stack + guard_bytes, stack_bytes);
  mmk_switch_stack(&main_stack_pointer, f.stack_pointer);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
}

void enter() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
  if (__tsan_acquire)
    __tsan_acquire(&start_order);
  try {
    kernel_body(kernel_context);
    if (!running->open.empty() || !running->groups.empty())
      fail("a thread ends with copies that it hasn't waited for");
    if (running->arrived)
      fail("a thread ends before a cluster barrier that it arrived at: " + running->place.text());
    Block& own = blocks[running->rank];
    if (own.read_until > cluster_meeting.generation)
      fail("a thread ends without a cluster barrier since a peer read its block's memory");
    ++own.ended;
  } catch (Stop&) {}
  if (__tsan_release)
    __tsan_release(&end_order);
  running->done = true;
  to_scheduler(true);
  __builtin_trap();
}

// The generation that the caller is of.
uint64_t arrive(Meeting& m, int expected, unsigned mask, Place place, const char* kind, int add, uint64_t value,
                int lane, bool orders) {
  const uint64_t generation = m.generation;
  const int parity = generation & 1;
  if (m.arrived == 0) {
    m.place = place;
    m.mask = mask;
    m.sum[parity] = 0;
  } else if (m.place != place || m.mask != mask) {
    fail(std::string("divergent ") + kind + ": " + m.place.text() + " and " + place.text());
  }
  m.sum[parity] += add;
  if (lane >= 0)
    m.value[parity][lane] = value;
  if (orders && __tsan_release)
    __tsan_release(&m.order[parity]);
  if (++m.arrived == expected)
    m.arrived = 0, ++m.generation;
  return generation;
}

void await(Meeting& m, uint64_t generation, Place place, bool orders) {
  running->waits = &m;
  running->generation = generation;
  running->place = place;
  while (m.generation == generation) {
    to_scheduler(false);
    if (!error.empty())
      throw Stop();
  }
  running->waits = nullptr;
  if (orders && __tsan_acquire)
    __tsan_acquire(&m.order[generation & 1]);
}

// Waits until `expected` threads are here. Returns which of the two generations this one was.
int meet(Meeting& m, int expected, unsigned mask, Place place, const char* kind, int add, uint64_t value, int lane,
         bool orders) {
  const uint64_t generation = arrive(m, expected, mask, place, kind, add, value, lane, orders);
  await(m, generation, place, orders);
  return generation & 1;
}

bool runnable(const Fiber& f) {
  return !f.done && (!f.waits || f.waits->generation != f.generation || !error.empty());
}

void start(Fiber& f, int rank, int index, uint3 block, dim3 grid, dim3 size) {
  if (!f.stack) {
    f.stack = static_cast<char*>(mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(f.stack, guard_bytes, PROT_NONE);
    if (__tsan_create_fiber)
      f.tsan = __tsan_create_fiber(0);
  }
  f.rank = rank;
  f.index = index;
  f.done = f.arrived = false;
  f.waits = nullptr;
  f.open.clear(), f.groups.clear();
  f.thread = {index % size.x, index / size.x % size.y, index / size.x / size.y};
  f.block = block;
  f.block_size = size;
  f.grid_size = grid;
  void** top = reinterpret_cast<void**>(f.stack + guard_bytes + stack_bytes);
  *--top = nullptr;  // aligns the stack, as a call would
  *--top = reinterpret_cast<void*>(enter);
  f.stack_pointer = top - 6;
}

bool by_warps() {
  return config.order == warps || config.order == warps_descending;
}
bool backwards() {
  return config.order == descending || config.order == warps_descending;
}

void run_blocks(std::mt19937& random, std::vector<int>& order) {
  if (__tsan_release)
    __tsan_release(&start_order);
  for (;;) {
    if (config.order == shuffled)
      std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    bool live = false;
    const size_t group = by_warps() ? warp_lanes : order.size();
    for (size_t first = 0; first < order.size(); first += group) {
      bool ran;
      do {
        ran = false;
        for (size_t i = first; i < std::min(first + group, order.size()); ++i) {
          Fiber& f = fibers[order[i]];
          if (runnable(f))
            to_fiber(f), ran = progress = true;
          live = live || !f.done;
        }
      } while (ran && by_warps());
    }
    if (!live)
      break;
    if (!progress) {  // all who are left wait for some who have gone
      for (size_t i = 0; i < order.size() && error.empty(); ++i) {
        const Fiber& f = fibers[i];
        if (!f.done)
          error = "block (" + std::to_string(f.block.x) + ", " + std::to_string(f.block.y) + "): deadlock: thread " +
                  std::to_string(f.index) + " waits at " + f.place.text() + " for threads that have ended";
      }
    }
  }
  if (__tsan_acquire)
    __tsan_acquire(&end_order);
}

}  // namespace

const char* run(dim3 grid, unsigned cluster, dim3 block, size_t shared, void (*body)(void*), void* context) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  threads = int(block.x * block.y * block.z);
  error.clear();
  if (threads < 1 || threads > 1024)
    return "a block has 1 to 1024 threads";
  if (int64_t(shared) > config.shared)
    return "more shared memory than a block may have";
  if (cluster < 1 || cluster > config.cluster)
    return "the device has no clusters of so many blocks";
  if (grid.x % cluster)
    return "the grid can't be cut into clusters";
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    error = "a grid has 1 to 2147483647 x 65535 x 65535 blocks, not " + std::to_string(grid.x) + " x " +
            std::to_string(grid.y) + " x " + std::to_string(grid.z);
    return error.c_str();
  }
  kernel_body = body;
  kernel_context = context;
  const int together = int(cluster) * threads;
  while (int(fibers.size()) < together)
    fibers.emplace_back();
  if (__tsan_get_current_fiber)
    main_tsan = __tsan_get_current_fiber();
  ++counts.launches;
  counts.shared = std::max<uint64_t>(counts.shared, shared);
  counts.cluster = std::max<uint64_t>(counts.cluster, cluster);

  std::mt19937 random(config.seed);
  std::vector<int> order(together);
  for (int i = 0; i < together; ++i)
    order[i] = backwards() ? together - 1 - i : i;
  const size_t count = size_t(grid.x) * grid.y * grid.z / cluster;
  std::vector<size_t> clusters(count);
  for (size_t i = 0; i < count; ++i)
    clusters[i] = backwards() ? count - 1 - i : i;
  if (config.order == shuffled)
    std::shuffle(clusters.begin(), clusters.end(), random);
  for (size_t i : clusters) {
    blocks.assign(cluster, Block());
    cluster_meeting.arrived = 0;
    for (unsigned rank = 0; rank < cluster; ++rank) {
      Block& b = blocks[rank];
      ++counts.blocks;
      b.warps.assign((threads + warp_lanes - 1) / warp_lanes, Meeting());
      // Exactly as many bytes as were asked for, so that AddressSanitizer sees an overrun; NaN, so that what nobody
      // wrote shows.
      const size_t slack = __sanitizer_start_switch_fiber ? 0 : 16;
      b.memory = static_cast<char*>(malloc(shared + slack));
      b.dynamic = slack ? b.memory + (16 - reinterpret_cast<uintptr_t>(b.memory) % 16) % 16 : b.memory;
      memset(b.dynamic, 0xff, shared);
      const size_t number = i * cluster + rank;
      uint3 at = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
      for (int t = 0; t < threads; ++t)
        start(fibers[rank * threads + t], int(rank), t, at, grid, block);
    }
    run_blocks(random, order);
    for (Block& b : blocks)
      free(b.memory);
    if (!error.empty())
      return error.c_str();
  }
  return nullptr;
}

void* dynamic_shared() {
  return blocks[running->rank].dynamic;
}

void cluster_arrive(const char* file, int line) {
  const Place place{file, line};
  if (running->arrived)
    fail("a thread arrives at a cluster barrier before it waited for the last: " + place.text());
  running->ticket = arrive(cluster_meeting, int(blocks.size()) * threads, 0, place, "cluster barrier", 0, 0, -1, true);
  running->arrived = true;
  running->place = place;
}

void cluster_wait(const char* file, int line) {
  const Place place{file, line};
  if (!running->arrived)
    fail("a thread waits for a cluster barrier that it didn't arrive at: " + place.text());
  await(cluster_meeting, running->ticket, place, true);
  running->arrived = false;
}

const float* peer(const float* mine, int64_t rank) {
  if (rank < 0 || rank >= int64_t(blocks.size()))
    fail("a cluster has no block " + std::to_string(rank));
  Block& other = blocks[rank];
  if (other.ended)
    fail("a thread reads the memory of a peer that may have ended");
  other.read_until = std::max(
      other.read_until, (running->arrived ? running->ticket : cluster_meeting.generation) + (running->arrived ? 2 : 1));
  return reinterpret_cast<const float*>(other.dynamic +
                                        (reinterpret_cast<const char*>(mine) - blocks[running->rank].dynamic));
}

int barrier(int value, const char* file, int line) {
  Meeting& m = blocks[running->rank].meeting;
  return m.sum[meet(m, threads, 0, {file, line}, "barrier", value, 0, -1, true)];
}

uint64_t shuffle_xor(unsigned mask, uint64_t value, int lanes, const char* file, int line) {
  const int lane = running->index % warp_lanes;
  const int warp = running->index / warp_lanes;
  const int other = lane ^ lanes;
  const int size = std::min(warp_lanes, threads - warp * warp_lanes);
  const unsigned present = size == warp_lanes ? ~0u : (1u << size) - 1;
  const Place place{file, line};
  if (mask & ~present || !(mask >> lane & 1))
    fail("a shuffle's mask names lanes that aren't there, or not its own, at " + place.text());
  if (!(mask >> other & 1))
    fail("a shuffle reads a lane outside its mask at " + place.text());
  Meeting& m = blocks[running->rank].warps[warp];
  const int parity =
      meet(m, __builtin_popcount(mask), mask, place, "shuffle", 0, value, lane, false);  // orders no memory
  return m.value[parity][other];
}

namespace {
Meeting& whole_warp(Place place) {
  if (threads % warp_lanes)
    fail("an operation of whole warps in a block that isn't made of them, at " + place.text());
  return blocks[running->rank].warps[running->index / warp_lanes];
}
}  // namespace

int lane() {
  return running->index % warp_lanes;
}

void warp_barrier(const char* file, int line) {
  meet(whole_warp({file, line}), warp_lanes, ~0u, {file, line}, "warp barrier", 0, 0, -1, true);
}

const Fragments* exchange(const Fragments& mine, const char* kind, const char* file, int line) {
  Meeting& m = whole_warp({file, line});
  m.fragments[m.generation & 1][lane()] = mine;
  return m.fragments[meet(m, warp_lanes, ~0u, {file, line}, kind, 0, 0, -1, false)];
}

void load_matrices(uint32_t* to, const void* row, bool transposed, const char* file, int line) {
  const Place place{file, line};
  if (reinterpret_cast<uintptr_t>(row) % 16)
    fail("a matrix's row isn't aligned at " + place.text());
  Meeting& m = whole_warp(place);
  const int parity =
      meet(m, warp_lanes, ~0u, place, "load of matrices", 0, reinterpret_cast<uintptr_t>(row), lane(), false);
  const void* rows[8];
  int at[8];
  uint16_t found[8];
  for (int i = 0; i < 8; ++i) {  // matrix i / 2, the lane's first or second element of it
    const int along = lane() / 4;
    const int across = 2 * (lane() % 4) + i % 2;
    rows[i] = reinterpret_cast<const void*>(m.value[parity][i / 2 * 8 + (transposed ? across : along)]);
    at[i] = transposed ? along : across;
  }
  read_halves(found, rows, at, 8);
  for (int i = 0; i < 4; ++i)
    to[i] = found[2 * i] | uint32_t(found[2 * i + 1]) << 16;
}

namespace {
void finish(const Copy& c) {
  copy_bytes(c.to, c.keep ? c.from : nullptr, c.bytes);
}
}  // namespace

void copy_async(void* to, const void* from, int bytes, bool keep) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("a copy isn't aligned");
  if (keep)
    count(counts.loaded, bytes);
  running->open.push_back({to, from, bytes, keep});
  if (!config.late_copies)
    finish(running->open.back());
}

void copy_commit() {
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

void copy_wait(int pending) {
  while (int(running->groups.size()) > pending) {
    if (config.late_copies)
      for (const Copy& c : running->groups.front())
        finish(c);
    running->groups.pop_front();
  }
}

}  // namespace emulator

// For those who load the emulator as a shared object.
extern "C" {
__attribute__((visibility("default"))) void emulator_configure(int order, unsigned seed, int late_copies,
                                                               int64_t shared, int64_t processors, int64_t cluster) {
  emulator::config = {order, seed, late_copies != 0, shared, processors, cluster};
}
__attribute__((visibility("default"))) void emulator_counts(uint64_t* six, int reset) {
  const emulator::Counts& c = emulator::counts;
  six[0] = c.loaded;
  six[1] = c.stored;
  six[2] = c.launches;
  six[3] = c.blocks;
  six[4] = c.shared;
  six[5] = c.cluster;
  if (reset)
    emulator::counts = {};
}
}
