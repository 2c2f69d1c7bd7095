#include "emulator.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <stdexcept>

#include "fibre.h"

// For ThreadSanitizer each fibre is a thread, and barriers are all that orders their accesses. This
// file and fibre.cpp are then compiled without its instrumentation, and with DREAM_RACES, and say
// what the instructions access that are executed here.
#if defined(DREAM_RACES)
extern "C" {
void __tsan_acquire(void* place);
void __tsan_release(void* place);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
}
#endif

namespace dream::cuda::emulator {
namespace {

#if defined(DREAM_RACES)
void note_before(void* place) { __tsan_release(place); }
void note_after(void* place) { __tsan_acquire(place); }
void note_read(const void* from) { __tsan_read_range(const_cast<void*>(from), 16); }
void note_write(void* to) { __tsan_write_range(to, 16); }
#else
void note_before(void*) {}
void note_after(void*) {}
void note_read(const void*) {}
void note_write(void*) {}
#endif

constexpr int kLanes = 32;
constexpr size_t kAlignment = 1024;  // of shared memory
constexpr size_t kMostPlaces = 64;     // that are kept of barriers
constexpr int kWords = 10;  // that a lane hands to a warp instruction

enum class Op { kNone, kShuffleXor, kShuffleUp, kLoadMatrices, kLoadTransposed, kMultiply };

struct Copy {
  char* shared;
  const char* global;  // null: zeros
};

struct Thread {
  Fibre fibre;
  int index = 0;
  bool done = false;
  // It waits until *watched differs from `seen`.
  const uint64_t* watched = nullptr;
  uint64_t seen = 0;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;

  bool runnable() const { return !done && (watched == nullptr || *watched != seen); }
};

// What the lanes of a warp hand to the instruction that they execute together, and get from it.
struct Warp {
  Op op = Op::kNone;
  int arrived = 0;
  uint64_t executed = 0;
  const char* shared[kLanes];
  uint32_t in[kLanes][kWords];
  uint32_t out[kLanes][4];
};

struct Block {
  int index[3] = {};
  int thread_count = 0;
  std::vector<std::vector<char>> shared;  // one for each block where races are looked for
  char* shared_begin = nullptr;
  size_t shared_bytes = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  const std::vector<Range>* memory = nullptr;
  int arrived = 0;
  uint64_t barriers = 0;
  char orders[2] = {};  // what barriers in turn order, by their addresses
  Place barrier_place = {"", 0};
  std::string error;
  Fibre scheduler;
  Thread* current = nullptr;
  void (*kernel)(const void*) = nullptr;
  const void* parameters = nullptr;
};

thread_local Block* block = nullptr;
thread_local std::vector<Place> reached;

// Written out, since ThreadSanitizer watches the functions of the C library wherever they are called.
const char* file_of(const char* path) {
  const char* file = path;
  for (; *path != 0; ++path) file = *path == '/' ? path + 1 : file;
  return file;
}

bool same(const Place& a, const Place& b) {
  if (a.line != b.line) return false;
  const char *x = a.file, *y = b.file;
  for (; *x != 0 && *x == *y; ++x) ++y;
  return *x == *y;
}

// Back to the scheduler for good.
[[noreturn]] void fail(const std::string& what) {
  if (block->error.empty()) {
    block->error = "thread " + std::to_string(block->current->index) + " of block (" +
                   std::to_string(block->index[0]) + ", " + std::to_string(block->index[1]) + ", " +
                   std::to_string(block->index[2]) + ") " + what;
  }
  block->current->done = true;
  for (;;) switch_fibre(block->current->fibre, block->scheduler);
}

void wait_for(const uint64_t* counter) {
  Thread& thread = *block->current;
  thread.watched = counter;
  thread.seen = *counter;
  switch_fibre(thread.fibre, block->scheduler);
  thread.watched = nullptr;
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// -- Warp instructions, executed by the last lane to arrive

void execute_load_matrices(Warp& warp, bool transposed) {
  for (int m = 0; m < 4; ++m) {
    uint16_t rows[8][8];
    for (int i = 0; i < 8; ++i) std::memcpy(rows[i], warp.shared[m * 8 + i], sizeof(rows[i]));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = transposed ? rows[j][i] : rows[i][j];
      const uint32_t high = transposed ? rows[j + 1][i] : rows[i][j + 1];
      warp.out[lane][m] = low | high << 16;
    }
  }
}

// c0, c1 are row g, c2, c3 row g + 8, columns 2t and 2t + 1, with g = lane / 4 and t = lane % 4.
void execute_multiply(Warp& warp, float (*to_float)(uint16_t)) {
  float a[16][16], b[16][8], c[16][8];
  const auto put = [&](float* target, uint32_t pair, int step) {
    target[0] = to_float(static_cast<uint16_t>(pair));
    target[step] = to_float(static_cast<uint16_t>(pair >> 16));
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4 * 2;
    const uint32_t* in = warp.in[lane];
    put(&a[g][t], in[0], 1);
    put(&a[g + 8][t], in[1], 1);
    put(&a[g][t + 8], in[2], 1);
    put(&a[g + 8][t + 8], in[3], 1);
    put(&b[t][g], in[4], 8);
    put(&b[t + 8][g], in[5], 8);
    for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][t + i % 2] = from_bits(in[6 + i]);
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) warp.out[lane][i] = to_bits(c[g + i / 2 * 8][t + i % 2]);
  }
}

void execute_shuffle(Warp& warp) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int by = static_cast<int>(warp.in[lane][1]);
    const int from = warp.op == Op::kShuffleXor ? lane ^ by : lane < by ? lane : lane - by;
    warp.out[lane][0] = warp.in[from][0];
  }
}

Warp& current_warp() { return block->warps[block->current->index / kLanes]; }
int current_lane() { return block->current->index % kLanes; }

// Hands over what the caller has written for its lane, and returns once all lanes have.
template <typename Execute>
const uint32_t* together(Op op, Execute execute) {
  Warp& warp = current_warp();
  if (warp.arrived > 0 && warp.op != op) fail("executes another warp instruction than its warp");
  warp.op = op;
  if (++warp.arrived == kLanes) {
    execute(warp);
    warp.arrived = 0;
    ++warp.executed;
  } else {
    wait_for(&warp.executed);
  }
  return warp.out[current_lane()];
}

void check_access(const void* address, size_t size, bool write) {
  const auto* p = static_cast<const char*>(address);
  for (const Range& range : *block->memory) {
    if (p >= range.begin && p + size <= range.end && (range.writable || !write)) return;
  }
  fail(std::string(write ? "writes" : "reads") + " global memory outside the call's tensors");
}

void check_shared(const void* address, size_t size) {
  const auto* p = static_cast<const char*>(address);
  if (p < block->shared_begin || p + size > block->shared_begin + block->shared_bytes) {
    fail("accesses shared memory outside the block's");
  }
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail("accesses shared memory unaligned");
}

void thread_main() {
  block->kernel(block->parameters);
  note_before(block);
  block->current->done = true;
  switch_fibre(block->current->fibre, block->scheduler);
}

void run_warp(Block& b, int warp) {
  for (bool ran = true; ran && b.error.empty();) {
    ran = false;
    for (int i = 0; i < kLanes && b.error.empty(); ++i) {
      const int lane = settings().backwards ? kLanes - 1 - i : i;
      Thread& thread = b.threads[warp * kLanes + lane];
      if (!thread.runnable()) continue;
      b.current = &thread;
      switch_fibre(b.scheduler, thread.fibre);
      ran = true;
    }
  }
}

// Poisoned. Where races are looked for, blocks are not ordered, and their memory is not reused.
void give_shared(Block& b) {
#if !defined(DREAM_RACES)
  b.shared.clear();
#endif
  b.shared.emplace_back(b.shared_bytes + kAlignment - 1, static_cast<char>(0xff));
  char* const begin = b.shared.back().data();
  b.shared_begin = begin + (-reinterpret_cast<uintptr_t>(begin) & (kAlignment - 1));
}

void run_block(Block& b) {
  give_shared(b);
  b.arrived = 0;
  for (Warp& warp : b.warps) warp.arrived = 0;
  for (Thread& thread : b.threads) {
    thread.done = false;
    thread.watched = nullptr;
    thread.groups.clear();
    thread.open.clear();
    thread.fibre.start(&thread_main);
  }
  const int warps = static_cast<int>(b.warps.size());
  for (;;) {
    bool any = false;
    for (int i = 0; i < warps; ++i) {
      const int warp = settings().backwards ? warps - 1 - i : i;
      const auto* first = &b.threads[warp * kLanes];
      if (std::none_of(first, first + kLanes, [](const Thread& t) { return t.runnable(); })) continue;
      any = true;
      run_warp(b, warp);
      if (!b.error.empty()) throw std::runtime_error("emulated kernel: " + b.error);
    }
    if (!any) break;
  }
  for (const Thread& thread : b.threads) {
    if (!thread.done) {
      throw std::runtime_error("emulated kernel: thread " + std::to_string(thread.index) +
                               " waits for threads that never come");
    }
  }
}

}  // namespace

Settings& settings() {
  thread_local Settings own;
  return own;
}

std::vector<Place> take_barriers() { return std::exchange(reached, {}); }

void launch(void (*kernel)(const void*), const void* parameters, const int (&grid)[3], int threads,
            size_t shared_bytes, const std::vector<Range>& memory) {
  if (threads % kLanes != 0) throw std::runtime_error("emulated kernel: a block has whole warps");
  Block b;
  b.thread_count = threads;
  b.shared_bytes = shared_bytes;
  b.threads = std::vector<Thread>(threads);
  for (int i = 0; i < threads; ++i) b.threads[i].index = i;
  b.warps.resize(threads / kLanes);
  b.memory = &memory;
  b.kernel = kernel;
  b.parameters = parameters;
  reached.reserve(kMostPlaces);
  Block* const outer = std::exchange(block, &b);
  struct Restore {
    Block* outer;
    ~Restore() { block = outer; }
  } restore{outer};
  for (b.index[2] = 0; b.index[2] < grid[2]; ++b.index[2]) {
    for (b.index[1] = 0; b.index[1] < grid[1]; ++b.index[1]) {
      for (b.index[0] = 0; b.index[0] < grid[0]; ++b.index[0]) run_block(b);
    }
  }
  note_after(&b);
}

int thread_index() { return block->current->index; }
int thread_count() { return block->thread_count; }
int block_index(int axis) { return block->index[axis]; }
char* shared_memory() { return block->shared_begin; }

void barrier(const char* path, int line) {
  const Place here{file_of(path), line};
  bool known = false;
  for (const Place& place : reached) known |= same(place, here);
  if (!known && reached.size() < kMostPlaces) reached.push_back(here);
  if (same({settings().skipped_file.c_str(), settings().skipped_line}, here)) return;
  Block& b = *block;
  if (b.arrived > 0 && !same(b.barrier_place, here)) {
    fail("is at another barrier than the threads before it");
  }
  b.barrier_place = here;
  // A thread that is through may reach the next barrier before another leaves this one.
  char* const order = &b.orders[b.barriers % 2];
  note_before(order);
  if (++b.arrived == b.thread_count) {
    b.arrived = 0;
    ++b.barriers;
  } else {
    wait_for(&b.barriers);
  }
  note_after(order);
}

void check_read(const void* address, size_t size) { check_access(address, size, false); }
void check_write(const void* address, size_t size) { check_access(address, size, true); }

void copy_async(void* shared, const void* global, bool zeros) {
  check_shared(shared, 16);
  note_write(shared);  // at any time from here to its wait
  if (!zeros) {
    check_read(global, 16);
    note_read(global);
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("copies from an unaligned address");
  }
  block->current->open.push_back(
      {static_cast<char*>(shared), zeros ? nullptr : static_cast<const char*>(global)});
}

void commit_copies() {
  Thread& thread = *block->current;
  thread.groups.push_back(std::exchange(thread.open, {}));
}

void wait_copies(int but_last) {
  Thread& thread = *block->current;
  while (static_cast<int>(thread.groups.size()) > but_last) {
    for (const Copy& copy : thread.groups.front()) {
      note_write(copy.shared);
      if (copy.global == nullptr) {
        std::memset(copy.shared, 0, 16);
      } else {
        std::memcpy(copy.shared, copy.global, 16);
      }
    }
    thread.groups.pop_front();
  }
}

uint32_t shuffle_xor(uint32_t value, int mask) {
  uint32_t* in = current_warp().in[current_lane()];
  in[0] = value;
  in[1] = static_cast<uint32_t>(mask);
  return together(Op::kShuffleXor, execute_shuffle)[0];
}

uint32_t shuffle_up(uint32_t value, int delta) {
  uint32_t* in = current_warp().in[current_lane()];
  in[0] = value;
  in[1] = static_cast<uint32_t>(delta);
  return together(Op::kShuffleUp, execute_shuffle)[0];
}

void load_matrices(uint32_t (&r)[4], const void* shared, bool transposed) {
  check_shared(shared, 16);
  note_read(shared);
  current_warp().shared[current_lane()] = static_cast<const char*>(shared);
  const Op op = transposed ? Op::kLoadTransposed : Op::kLoadMatrices;
  const uint32_t* out =
      together(op, [&](Warp& warp) { execute_load_matrices(warp, transposed); });
  std::copy(out, out + 4, r);
}

void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
              float (*to_float)(uint16_t)) {
  uint32_t* in = current_warp().in[current_lane()];
  std::copy(a, a + 4, in);
  in[4] = b0;
  in[5] = b1;
  for (int i = 0; i < 4; ++i) in[6 + i] = to_bits(c[i]);
  const uint32_t* out =
      together(Op::kMultiply, [&](Warp& warp) { execute_multiply(warp, to_float); });
  for (int i = 0; i < 4; ++i) c[i] = from_bits(out[i]);
}

}  // namespace dream::cuda::emulator
