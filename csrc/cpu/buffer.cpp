#include "buffer.h"

#include <atomic>
#include <new>
#include <utility>

namespace dream::cpu {
namespace {

std::atomic<int64_t> held{0};
std::atomic<int64_t> peak{0};

int64_t bytes(int64_t size) { return size * static_cast<int64_t>(sizeof(float)); }

int64_t product(int64_t size, int64_t count) {
  int64_t result, in_bytes;
  if (__builtin_mul_overflow(size, count, &result) ||
      __builtin_mul_overflow(result, static_cast<int64_t>(sizeof(float)), &in_bytes)) {
    throw std::bad_alloc();
  }
  return result;
}

}  // namespace

Buffer::Buffer(int64_t size, int64_t count)
    : size_(product(size, count)), memory_(size_ > 0 ? new float[size_] : nullptr) {
  const int64_t now = held.fetch_add(bytes(size)) + bytes(size);
  int64_t most = peak.load();
  while (now > most && !peak.compare_exchange_weak(most, now)) {
  }
}

Buffer::Buffer(Buffer&& other) noexcept
    : size_(std::exchange(other.size_, 0)), memory_(std::move(other.memory_)) {}

Buffer::~Buffer() { held.fetch_sub(bytes(size_)); }

int64_t take_peak_scratch_bytes() { return peak.exchange(held.load()); }

}  // namespace dream::cpu
