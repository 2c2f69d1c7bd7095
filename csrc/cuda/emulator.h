// Runs the threads of a block on the host, one fibre each, in a fixed order: a thread runs until it
// waits for others.
//
// Shared memory begins as NaN, a copy arrives at its wait and no sooner, and every access of global
// memory is checked against the tensors of the call. What a kernel does wrong ends the launch with
// std::runtime_error: an access outside, a barrier or warp instruction that not all threads reach.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace dream::cuda::emulator {

// Memory that a launch may access.
struct Range {
  const char* begin;
  const char* end;
  bool writable;
};

// A barrier: the name of its file, without folders, and its line.
struct Place {
  const char* file;
  int line;
};

// How launches of this thread run; for tests.
struct Settings {
  bool backwards = false;   // the last warp, and the last thread, first
  std::string skipped_file;  // of a barrier that does nothing, and
  int skipped_line = 0;
};
Settings& settings();

// The barriers that launches of this thread have reached since the last call of this function.
std::vector<Place> take_barriers();

// Runs a grid of blocks of `threads` threads, one block after the other.
void launch(void (*kernel)(const void*), const void* parameters, const int (&grid)[3], int threads,
            size_t shared_bytes, const std::vector<Range>& memory);

// -- What the kernels call

int thread_index();
int thread_count();
int block_index(int axis);
char* shared_memory();
void barrier(const char* file, int line);
void check_read(const void* address, size_t size);
void check_write(const void* address, size_t size);
void copy_async(void* shared, const void* global, bool zeros);
void commit_copies();
void wait_copies(int but_last);
uint32_t shuffle_xor(uint32_t value, int mask);
uint32_t shuffle_up(uint32_t value, int delta);
void load_matrices(uint32_t (&r)[4], const void* shared, bool transposed);
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
              float (*to_float)(uint16_t));

}  // namespace dream::cuda::emulator
