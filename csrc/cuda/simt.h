// The words that the kernels are written in, for two worlds.
//
// nvcc turns them into CUDA and inline PTX. A host compiler turns them into calls of emulator.h,
// which runs every thread of a block on the CPU: the same source with the same fragments in the same
// threads (PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix").
//
// Global memory is accessed through load(), store() and copy_async() alone, so that the emulator
// can check each address.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DREAM_DEVICE __device__ __forceinline__
#define DREAM_UNROLL _Pragma("unroll")
#define DREAM_ONCE _Pragma("unroll 1")
#else
#include "../float_types.h"
#include "emulator.h"
#define DREAM_DEVICE inline
#define DREAM_UNROLL
#define DREAM_ONCE
#endif

namespace dream::cuda {

constexpr int kWarp = 32;
constexpr float kInf = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

// Elements of 16 bits: which instructions multiply and round them.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

#if defined(__CUDACC__)

DREAM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DREAM_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
DREAM_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
DREAM_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
DREAM_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }

// The block's shared memory, aligned to 1024 bytes.
DREAM_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// A place in shared memory, as a number that instructions take.
using Shared = uint32_t;

DREAM_DEVICE Shared shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

DREAM_DEVICE void sync_threads() { __syncthreads(); }

// The same number, of which nvcc knows nothing: it cannot compute ahead of a loop, and keep in
// registers, what is needed in a rare branch only.
DREAM_DEVICE int32_t opaque(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// -- Global memory

template <typename T>
DREAM_DEVICE T load(const T* address) {
  return *address;
}

template <typename T>
DREAM_DEVICE void store(T* address, T value) {
  *address = value;
}

DREAM_DEVICE void atomic_add(int32_t* address, int32_t value) { atomicAdd(address, value); }

// Copies 16 bytes to shared memory, or writes zeros there. They arrive at a wait.
DREAM_DEVICE void copy_async(Shared shared, const void* global, bool zeros) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared),
               "l"(global), "r"(zeros ? 0 : 16)
               : "memory");
}

DREAM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits for all but this thread's last N groups of copies.
template <int N>
DREAM_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// -- Warps

template <typename T>
DREAM_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <typename T>
DREAM_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8. With `transposed`
// each thread gets the elements of the transposed matrices.
template <bool transposed>
DREAM_DEVICE void load_matrices(uint32_t (&r)[4], Shared shared) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
  }
}

// c[16, 8] += a[16, 16] b[16, 8]
template <typename T>
DREAM_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, Half)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// -- Numbers

DREAM_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

DREAM_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

template <typename T>
DREAM_DEVICE uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (__is_same(T, Half)) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

template <typename T>
DREAM_DEVICE float unpack(uint32_t bits) {
  if constexpr (__is_same(T, Half)) {
    float x;
    asm("{.reg .b16 h, unused; mov.b32 {h, unused}, %1; cvt.f32.f16 %0, h;}\n" : "=f"(x) : "r"(bits));
    return x;
  } else {
    return __uint_as_float(bits << 16);
  }
}

#else  // on the host

DREAM_DEVICE int thread_index() { return emulator::thread_index(); }
DREAM_DEVICE int thread_count() { return emulator::thread_count(); }
DREAM_DEVICE int block_x() { return emulator::block_index(0); }
DREAM_DEVICE int block_y() { return emulator::block_index(1); }
DREAM_DEVICE int block_z() { return emulator::block_index(2); }
DREAM_DEVICE char* shared_memory() { return emulator::shared_memory(); }

DREAM_DEVICE int32_t opaque(int32_t x) { return x; }

using Shared = uintptr_t;
DREAM_DEVICE Shared shared_address(const void* shared) {
  return reinterpret_cast<uintptr_t>(shared);
}

// The caller's place tells barriers apart.
DREAM_DEVICE void sync_threads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::barrier(file, line);
}

template <typename T>
DREAM_DEVICE T load(const T* address) {
  emulator::check_read(address, sizeof(T));
  return *address;
}

template <typename T>
DREAM_DEVICE void store(T* address, T value) {
  emulator::check_write(address, sizeof(T));
  *address = value;
}

DREAM_DEVICE void atomic_add(int32_t* address, int32_t value) {
  emulator::check_write(address, sizeof(*address));
  __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

DREAM_DEVICE void copy_async(Shared shared, const void* global, bool zeros) {
  emulator::copy_async(reinterpret_cast<void*>(shared), global, zeros);
}

DREAM_DEVICE void commit_copies() { emulator::commit_copies(); }

template <int N>
DREAM_DEVICE void wait_copies() {
  emulator::wait_copies(N);
}

// What `exchange` makes of a number's bits and `other`, as a number.
template <typename T>
DREAM_DEVICE T exchanged(T value, int other, uint32_t (*exchange)(uint32_t, int)) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits = exchange(bits, other);
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

template <typename T>
DREAM_DEVICE T shuffle_xor(T value, int mask) {
  return exchanged(value, mask, emulator::shuffle_xor);
}

template <typename T>
DREAM_DEVICE T shuffle_up(T value, int delta) {
  return exchanged(value, delta, emulator::shuffle_up);
}

template <bool transposed>
DREAM_DEVICE void load_matrices(uint32_t (&r)[4], Shared shared) {
  emulator::load_matrices(r, reinterpret_cast<const void*>(shared), transposed);
}

template <typename T>
using HostType = std::conditional_t<std::is_same_v<T, Half>, dream::Float16, dream::BFloat16>;

template <typename T>
DREAM_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply(c, a, b0, b1, &HostType<T>::to_float);
}

DREAM_DEVICE float exp2(float x) { return __builtin_exp2f(x); }
DREAM_DEVICE float log2(float x) { return __builtin_log2f(x); }

template <typename T>
DREAM_DEVICE uint32_t pack(float low, float high) {
  return HostType<T>::from_float(low) | uint32_t{HostType<T>::from_float(high)} << 16;
}

template <typename T>
DREAM_DEVICE float unpack(uint32_t bits) {
  return HostType<T>::to_float(static_cast<uint16_t>(bits));
}

#endif

DREAM_DEVICE int lane_index() { return thread_index() % kWarp; }
DREAM_DEVICE int warp_index() { return thread_index() / kWarp; }

DREAM_DEVICE float larger(float a, float b) { return a > b ? a : b; }

// Maxima and sums over the four threads that hold a row of a fragment.
DREAM_DEVICE float quad_max(float x) {
  x = larger(x, shuffle_xor(x, 1));
  return larger(x, shuffle_xor(x, 2));
}

DREAM_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

}  // namespace dream::cuda
