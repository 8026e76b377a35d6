// The arithmetic ceiling of one CPU thread: independent chains of fused multiply-adds that stay in registers.
//
// torch.mm is no ceiling: its BLAS may use a narrower instruction set than the machine has (MKL takes AVX2 on AMD).
// Compiled for the machine it runs on (-march=native), called from one thread per core by roofline.py.

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));

// Latency 4 times throughput 2 needs 8 chains; 12 leave room for three-cycle and two-port variations.
constexpr int kChains = 12;

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

extern "C" {

// Runs `steps` rounds and returns the number of floating-point operations done (a fused multiply-add counts as two).
double linattn_peak_fp32(long steps, float* sink) {
  Vector chain[kChains], a = {}, b = {};
  a += 0.999f;
  b += 0.001f;
  for (int i = 0; i < kChains; ++i) chain[i] = b * float(i);
  for (long s = 0; s < steps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * a + b;
  }
  Vector sum = {};
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  *sink = sum[0];
  return 2.0 * double(steps) * kChains * (VECTOR_BYTES / 4);
}

// The same with bfloat16 products and float32 sums; 0 where the instruction set has none.
double linattn_peak_bf16(long steps, float* sink) {
#if defined(__AVX512BF16__)
  __m512 chain[kChains];
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00), b = (__m512bh)_mm512_set1_epi32(0x38003800);
  for (int i = 0; i < kChains; ++i) chain[i] = _mm512_setzero_ps();
  for (long s = 0; s < steps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      chain[i] = _mm512_dpbf16_ps(chain[i], a, b);
      asm volatile("" : "+v"(chain[i]));  // keeps the compiler from folding equal chains into one
    }
  }
  __m512 sum = chain[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_add_ps(sum, chain[i]);
  *sink = _mm512_reduce_add_ps(sum);
  return 2.0 * double(steps) * kChains * 32;
#else
  (void)steps;
  *sink = 0;
  return 0;
#endif
}
}
