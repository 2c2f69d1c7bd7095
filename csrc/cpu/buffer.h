// Scratch memory of a call, counted.
#pragma once

#include <cstdint>
#include <memory>

namespace dream::cpu {

// Uninitialised float32 numbers; none when the size is 0, and the address is null then.
class Buffer {
 public:
  // Holds `count` times `size` numbers. Throws std::bad_alloc when memory does not suffice.
  explicit Buffer(int64_t size, int64_t count = 1);
  ~Buffer();

  Buffer(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer& operator=(Buffer&&) = delete;

  float* data() const { return memory_.get(); }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  std::unique_ptr<float[]> memory_;
};

// The most bytes that all buffers of the process held at once since the last call of this function.
int64_t take_peak_scratch_bytes();

}  // namespace dream::cpu
