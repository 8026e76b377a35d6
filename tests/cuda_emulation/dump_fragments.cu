// Prints what the fragments of a warp hold on the GPU of this machine, for comparison with the emulator
// (tests/test_cuda_on_gpu.py):  nvcc -std=c++20 -arch=native -Icsrc/cuda dump_fragments.cu && ./a.out
#include <cstdio>
#include <cstring>

#include "fragments.h"

using namespace linattn::cuda;

#define CHECK(call)                                            \
  do {                                                         \
    cudaError_t error = call;                                  \
    if (error != cudaSuccess) {                                \
      std::fprintf(stderr, "%s\n", cudaGetErrorString(error)); \
      return 1;                                                \
    }                                                          \
  } while (false)

// Whole numbers from -128 on, which both types hold exactly.
uint16_t value(int i, bool bfloat16) {
  const float x = static_cast<float>(i - 128);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (bfloat16) return static_cast<uint16_t>(bits >> 16);
  if (x == 0) return 0;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023));
}

int main() {
  uint16_t *left, *right;
  float *sum, *d;
  uint32_t* registers;
  CHECK(cudaMallocHost(&left, 512));
  CHECK(cudaMallocHost(&right, 256));
  CHECK(cudaMallocHost(&sum, 512));
  CHECK(cudaMallocHost(&d, 512));
  CHECK(cudaMallocHost(&registers, 3 * 512));
  for (int bfloat16 = 0; bfloat16 < 2; ++bfloat16) {
    for (int i = 0; i < 256; ++i) left[i] = value(i, bfloat16);
    for (int i = 0; i < 128; ++i) right[i] = value(i + 64, bfloat16), sum[i] = 0.5f * static_cast<float>(i);
    Fragments p{left, right, sum, registers, registers + 128, registers + 256, d};
    const char* error = bfloat16 ? launch(fragments_kernel<BFloat16>, {1, 1, 1}, 32, 1024, nullptr, p)
                                 : launch(fragments_kernel<Float16>, {1, 1, 1}, 32, 1024, nullptr, p);
    if (error) return std::fprintf(stderr, "%s\n", error), 1;
    CHECK(cudaDeviceSynchronize());
    const char* type = bfloat16 ? "bfloat16" : "float16";
    for (int i = 0; i < 384; ++i)
      std::printf("%s %s %u\n", type, i < 128 ? "a" : i < 256 ? "transposed" : "b", registers[i]);
    for (int i = 0; i < 128; ++i) std::printf("%s d %.9g\n", type, d[i]);
  }
}
