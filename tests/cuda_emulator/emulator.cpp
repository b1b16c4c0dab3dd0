// Launches: blocks one after another, or a cluster's together, and whose turn it is among their threads.
#include "emulator.h"

#include <algorithm>
#include <mutex>
#include <random>

#include "machine.h"

namespace emulator {

Config config;
Counts counts;
Thread* current;

int threads;
std::vector<Block> blocks;
Meeting cluster_meeting;
Fiber* running;
std::string error;

namespace {

std::deque<Fiber> fibers;
void (*kernel_body)(void*);
void* kernel_context;
char start_order, end_order;  // what ThreadSanitizer acquires and releases

}  // namespace

void fail(const std::string& what) {
  if (error.empty())
    error = "block (" + std::to_string(running->block.x) + ", " + std::to_string(running->block.y) + "): " + what;
  throw Stop();
}

void run_thread() {
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
}

namespace {

bool runnable(const Fiber& f) {
  return !f.done && (!f.waits || f.waits->generation != f.generation || !error.empty());
}

void start(Fiber& f, int rank, int index, uint3 block, dim3 grid, dim3 size) {
  f.rank = rank;
  f.index = index;
  f.done = f.arrived = false;
  f.waits = nullptr;
  f.open.clear(), f.groups.clear();
  f.thread = {index % size.x, index / size.x % size.y, index / size.x / size.y};
  f.block = block;
  f.block_size = size;
  f.grid_size = grid;
  prepare(f);
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
  become_scheduler();
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

}  // namespace emulator

// For those who load the emulator as a shared object.
extern "C" {
__attribute__((visibility("default"))) void emulator_configure(int order, unsigned seed, int late_copies,
                                                               int64_t shared, int64_t processors, int64_t cluster,
                                                               int tiles) {
  emulator::config = {order, seed, late_copies != 0, shared, processors, cluster, tiles != 0};
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
