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
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00), b = (__m512bh)_mm512_set1_epi32(0x38003800);
  // Named, not an array: GCC keeps an array that asm touches in memory.
  __m512 c0 = _mm512_setzero_ps(), c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0, c6 = c0, c7 = c0, c8 = c0, c9 = c0;
  __m512 c10 = c0, c11 = c0;
  // The empty asm keeps the compiler from folding equal chains into one.
#define STEP(c)                  \
  c = _mm512_dpbf16_ps(c, a, b); \
  asm volatile("" : "+v"(c))
  for (long s = 0; s < steps; ++s) {
    STEP(c0);
    STEP(c1);
    STEP(c2);
    STEP(c3);
    STEP(c4);
    STEP(c5);
    STEP(c6);
    STEP(c7);
    STEP(c8);
    STEP(c9);
    STEP(c10);
    STEP(c11);
  }
#undef STEP
  const __m512 sum = c0 + c1 + c2 + c3 + c4 + c5 + c6 + c7 + c8 + c9 + c10 + c11;
  *sink = _mm512_reduce_add_ps(sum);
  return 2.0 * double(steps) * kChains * 32;
#else
  (void)steps;
  *sink = 0;
  return 0;
#endif
}
}
