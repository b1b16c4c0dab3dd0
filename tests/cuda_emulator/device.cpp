// What kernels call: barriers and what warps do together, clusters, and copies that come later.
#include <algorithm>

#include "machine.h"

namespace emulator {

void copy_bytes(void* to, const void* from, int bytes);  // copy.cpp: what the sanitizers are to see
void read_halves(uint16_t* to, const void* const* rows, const int* at, int count);

namespace {

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
    to_scheduler();
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

}  // namespace

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

unsigned ballot(unsigned mask, bool value, const char* file, int line) {
  const Place place{file, line};
  const int lane = running->index % warp_lanes;
  if (!(mask >> lane & 1))
    fail("a ballot's mask doesn't name its own lane, at " + place.text());
  Meeting& m = blocks[running->rank].warps[running->index / warp_lanes];
  const int add = int(unsigned(value) << lane);
  return unsigned(m.sum[meet(m, __builtin_popcount(mask), mask, place, "ballot", add, 0, lane, false)]);
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
