// Runs CUDA kernels on a CPU, one fiber per CUDA thread, and looks for what hardware would not forgive.
//
// csrc/cuda/warp.h maps its vocabulary onto these functions when it is not compiled by nvcc. A kernel's translation
// unit is compiled with -fsanitize=thread, but not linked with that sanitizer: emulator.cpp defines the functions that
// the compiler inserts, so every plain load and store of a kernel is seen as well. How it works: docs/cuda.md.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>

namespace emulation {

// ---- what a kernel sees of its thread; null outside kernels
struct Thread {
  int index;
  std::array<int64_t, 3> block;
  unsigned char* shared;
};
extern Thread* thread;

// ---- from the host
// Runs the kernel for every block. Null, or why it could not be launched.
const char* launch(std::array<int64_t, 3> grid, int threads, int shared_bytes, void (*kernel)(void*), void* params);
const char* fill_zero(void* p, int64_t bytes);

// ---- from kernels
void barrier_block();
void barrier_warp(uint32_t lanes);
void barrier_named(int id, int threads, bool wait);
int atomic_add(int* address, int value, bool acquire_release);
void load_quad(uint32_t (&value)[4], const void* p);
void store_quad(void* p, const uint32_t (&value)[4]);
uint32_t shuffle_xor(uint32_t lanes, uint32_t value, int distance);
void copy_async(void* target, const void* source, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16);
// Whether the planted fault of this name is switched on.
bool fault(const char* name);

// ---- numbers
inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
float exp2_fast(float x);
float exp_precise(float x);
float to_float(uint16_t bits, bool bfloat16);
uint16_t from_float(float x, bool bfloat16);  // to nearest, ties to even

}  // namespace emulation
