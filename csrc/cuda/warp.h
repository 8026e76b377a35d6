// The vocabulary of the CUDA kernels: copies, fragments, matrix instructions, barriers, shuffles, atomics.
//
// A kernel of csrc/cuda uses nothing else of the machine, so that one source serves two: under nvcc each name is its
// PTX instruction (sm_80 and newer), under g++ the emulator of tests/cuda_emulation, which runs kernels on a CPU and
// looks for races (docs/cuda.md). No inline PTX and no __shared__ outside this file.
//
// 16-bit values travel as bits: a tensor is uint16_t*, a fragment register holds two values, the lower column in the
// lower half. Which type the bits mean is a tag, Float16 or BFloat16.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulator.h"
#endif

#ifdef __CUDACC__
#define LINATTN_DEVICE __device__ __forceinline__
#define LINATTN_HOST_DEVICE __host__ __device__
#define LINATTN_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
// A planted fault, by name: the tests switch one on and demand that it is found. Never on in a real build.
#define LINATTN_FAULT(name) false
#else
#define LINATTN_DEVICE inline __attribute__((always_inline))
#define LINATTN_HOST_DEVICE
#define LINATTN_KERNEL(threads, blocks_per_sm) void
#define LINATTN_FAULT(name) (::emulation::fault(name))
#endif

namespace linattn::cuda {

struct Float16 {};
struct BFloat16 {};
template <class T>
inline constexpr bool is_bfloat16 = false;
template <>
inline constexpr bool is_bfloat16<BFloat16> = true;

// 16 bytes in registers.
struct alignas(16) Quad {
  uint32_t x[4];
};

inline constexpr int kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

#ifdef __CUDACC__

// ---- where am I
LINATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
LINATTN_DEVICE int64_t block_x() { return blockIdx.x; }
LINATTN_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
LINATTN_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
LINATTN_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// ---- barriers
// All threads of the block: what any of them wrote before is visible to all after.
LINATTN_DEVICE void barrier_block() { __syncthreads(); }
// The same among the lanes of a warp.
LINATTN_DEVICE void barrier_warp() { __syncwarp(); }
// The same among `threads` threads (whole warps) that name barrier `id`, 1..15.
LINATTN_DEVICE void barrier_named(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts as having come to barrier `id`, and goes on: what was written before is visible to those who wait there.
LINATTN_DEVICE void barrier_named_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- atomics in global memory, by all blocks of the device; each returns the value before
// Releases what this thread wrote, and what barriers and atomics made visible to it; acquires likewise.
LINATTN_DEVICE int atomic_add_acquire_release(int* address, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(address)), "r"(value)
               : "memory");
  return before;
}
// Orders nothing else.
LINATTN_DEVICE int atomic_add_relaxed(int* address, int value) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(address)), "r"(value)
               : "memory");
  return before;
}

// ---- 16 bytes at once, from and to a multiple of 16 in any memory
LINATTN_DEVICE Quad load_quad(const void* p) {
  uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
LINATTN_DEVICE void store_quad(void* p, const Quad& v) {
  *static_cast<uint4*>(p) = make_uint4(v.x[0], v.x[1], v.x[2], v.x[3]);
}

// ---- exchange within a warp; all 32 lanes must come. Orders no memory.
LINATTN_DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(kAllLanes, value, lanes); }

// ---- asynchronous copies, global to shared
LINATTN_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
// Copies `bytes` (0..16) and fills the rest of the 16 with zeros; both addresses are multiples of 16.
LINATTN_DEVICE void copy_async_16(void* target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}
LINATTN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's committed groups are under way. Others see the data after a barrier.
template <int N>
LINATTN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- fragments: four 8 x 8 matrices of 16-bit values. Lane l names the row l % 8 of matrix l / 8 (16 bytes in shared
// memory) and receives of every matrix row l / 4, columns 2 (l % 4) and the next; of its transpose with _transposed.
LINATTN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
LINATTN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- d += a b with a (16, 16), b (16, 8), d (16, 8) in float32. With g = lane / 4 and t = lane % 4:
//   a: registers hold (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with the next column;
//   b: (2t, g) and (2t + 8, g), each with the next row;  d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
LINATTN_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (is_bfloat16<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- two 16-bit values in a register
template <class T>
LINATTN_DEVICE uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (is_bfloat16<T>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}
template <class T>
LINATTN_DEVICE float low_half(uint32_t bits) {
  if constexpr (is_bfloat16<T>) return __uint_as_float(bits << 16);
  float x;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(x) : "r"(bits));
  return x;
}
template <class T>
LINATTN_DEVICE float high_half(uint32_t bits) {
  if constexpr (is_bfloat16<T>) return __uint_as_float(bits & 0xffff0000u);
  float x;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(bits));
  return x;
}

LINATTN_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
LINATTN_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
// 2^x within 2 units in the last place, tiny results flushed to 0.
LINATTN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// e^x within 1 unit in the last place.
LINATTN_DEVICE float exp_precise(float x) { return expf(x); }

// ---- launches, from the host
using Stream = cudaStream_t;
struct Grid {
  int64_t x, y, z;
};

// Null, or what the CUDA runtime says.
template <class Params>
const char* launch(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, Stream stream, const Params& p) {
  if (shared_bytes > 48 * 1024) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  kernel<<<blocks, threads, shared_bytes, stream>>>(p);
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* fill_zero(void* p, int64_t bytes, Stream stream) {
  cudaError_t error = cudaMemsetAsync(p, 0, static_cast<size_t>(bytes), stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else  // ---------------------------------------------------------------------------------------------- emulated

LINATTN_DEVICE int thread_index() { return emulation::thread->index; }
LINATTN_DEVICE int64_t block_x() { return emulation::thread->block[0]; }
LINATTN_DEVICE int block_y() { return static_cast<int>(emulation::thread->block[1]); }
LINATTN_DEVICE int block_z() { return static_cast<int>(emulation::thread->block[2]); }
LINATTN_DEVICE unsigned char* shared_memory() { return emulation::thread->shared; }

LINATTN_DEVICE void barrier_block() { emulation::barrier_block(); }
LINATTN_DEVICE void barrier_warp() { emulation::barrier_warp(kAllLanes); }
LINATTN_DEVICE void barrier_named(int id, int threads) { emulation::barrier_named(id, threads, true); }
LINATTN_DEVICE void barrier_named_arrive(int id, int threads) { emulation::barrier_named(id, threads, false); }

LINATTN_DEVICE int atomic_add_acquire_release(int* address, int value) {
  return emulation::atomic_add(address, value, true);
}
LINATTN_DEVICE int atomic_add_relaxed(int* address, int value) { return emulation::atomic_add(address, value, false); }

LINATTN_DEVICE Quad load_quad(const void* p) {
  Quad v;
  emulation::load_quad(v.x, p);
  return v;
}
LINATTN_DEVICE void store_quad(void* p, const Quad& v) { emulation::store_quad(p, v.x); }

LINATTN_DEVICE float shuffle_xor(float value, int lanes) {
  return emulation::float_from_bits(emulation::shuffle_xor(kAllLanes, emulation::float_bits(value), lanes));
}

LINATTN_DEVICE void copy_async_16(void* target, const void* source, int bytes) {
  emulation::copy_async(target, source, bytes);
}
LINATTN_DEVICE void copy_async_commit() { emulation::copy_async_commit(); }
template <int N>
LINATTN_DEVICE void copy_async_wait() {
  emulation::copy_async_wait(N);
}

LINATTN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) { emulation::load_matrices(r, row, false); }
LINATTN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulation::load_matrices(r, row, true);
}
template <class T>
LINATTN_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t b[2] = {b0, b1};
  emulation::multiply_add(d, a, b, is_bfloat16<T>);
}

template <class T>
LINATTN_DEVICE uint32_t pack(float low, float high) {
  return emulation::from_float(low, is_bfloat16<T>) | static_cast<uint32_t>(emulation::from_float(high, is_bfloat16<T>))
                                                          << 16;
}
template <class T>
LINATTN_DEVICE float low_half(uint32_t bits) {
  return emulation::to_float(static_cast<uint16_t>(bits), is_bfloat16<T>);
}
template <class T>
LINATTN_DEVICE float high_half(uint32_t bits) {
  return emulation::to_float(static_cast<uint16_t>(bits >> 16), is_bfloat16<T>);
}

LINATTN_DEVICE uint32_t float_bits(float x) { return emulation::float_bits(x); }
LINATTN_DEVICE float float_from_bits(uint32_t bits) { return emulation::float_from_bits(bits); }
LINATTN_DEVICE float exp2_fast(float x) { return emulation::exp2_fast(x); }
LINATTN_DEVICE float exp_precise(float x) { return emulation::exp_precise(x); }

using Stream = void*;
struct Grid {
  int64_t x, y, z;
};

template <class Params>
const char* launch(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, Stream, const Params& p) {
  struct Call {
    void (*kernel)(Params);
    Params params;
  } call{kernel, p};
  return emulation::launch(
      {grid.x, grid.y, grid.z}, threads, shared_bytes,
      [](void* c) { static_cast<Call*>(c)->kernel(static_cast<Call*>(c)->params); }, &call);
}

inline const char* fill_zero(void* p, int64_t bytes, Stream) { return emulation::fill_zero(p, bytes); }

#endif

}  // namespace linattn::cuda
