// The machine, one vector type per instruction set.
//
// A kernel file is compiled once per instruction set with -DLINATTN_ISA=<name> and the matching -m flags. Everything
// here lives in a namespace of that name and is forced inline: no function built with wide instructions can be merged
// by the linker into a narrower unit. For the same reason kernel files use no inline function of the standard library.
//
//   V            one register of W floats (16: AVX-512, 8: AVX2, 4: baseline, in GCC vector extensions)
//   load/store   float registers in scratch memory; load_n<T>/store_n<T> the first n lanes of a T array as floats:
//                lanes past n are neither read nor written (they come back as zero)
//   exp_neg      exp(x) for x <= 0 by degree: 6 float32 (1 ulp or so), 4 float16, 3 bfloat16 (before rounding)
//   phi, phi_grad the feature maps of linear attention, by their exact branches in float32
//   F32, BF16P   a multiply step: unit = one float (fma), or a pair of bfloat16 (vdpbf16ps, which flushes denormals)
//
// NaN: vmax(a, b) and vmin(a, b) return b when the two are unordered (the x86 rule, kept by the baseline); phi relies
// on it to let a NaN through.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef LINATTN_ISA
#define LINATTN_ISA baseline
#endif
#define LINATTN_INLINE inline __attribute__((always_inline))
#define LINATTN_INLINE_LAMBDA __attribute__((always_inline))

namespace linattn {
namespace LINATTN_ISA {

// Storage types: bits only, arithmetic is always float32 (or a pair product of bfloat16).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
// ------------------------------------------------------------------------------------------------ AVX-512
struct V {
  static constexpr int W = 16;
  __m512 v;
};
LINATTN_INLINE __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
LINATTN_INLINE V zero() { return V{_mm512_setzero_ps()}; }
LINATTN_INLINE V set1(float x) { return V{_mm512_set1_ps(x)}; }
LINATTN_INLINE V load(const void* p) { return V{_mm512_loadu_ps(p)}; }
LINATTN_INLINE void store(void* p, V a) { _mm512_storeu_ps(p, a.v); }
LINATTN_INLINE V fma(V a, V b, V c) { return V{_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LINATTN_INLINE V operator*(V a, V b) { return V{_mm512_mul_ps(a.v, b.v)}; }
LINATTN_INLINE V operator+(V a, V b) { return V{_mm512_add_ps(a.v, b.v)}; }
LINATTN_INLINE V operator-(V a, V b) { return V{_mm512_sub_ps(a.v, b.v)}; }
LINATTN_INLINE V vmax(V a, V b) { return V{_mm512_max_ps(a.v, b.v)}; }
LINATTN_INLINE V vmin(V a, V b) { return V{_mm512_min_ps(a.v, b.v)}; }
LINATTN_INLINE float hsum(V a) { return _mm512_reduce_add_ps(a.v); }
// out[r] = sum of the lanes of a[r], every row added in the same order.
LINATTN_INLINE void hsum4(const V (&a)[4], float* out) {
  __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
  __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
  __m512 s = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));  // per 128 bits: 4 rows
  __m256 t = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}
LINATTN_INLINE V if_positive(V x, V a, V b) {  // x > 0 ? a : b
  return V{_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ), b.v, a.v)};
}
LINATTN_INLINE V round_even(V t) { return V{_mm512_roundscale_ps(t.v, 8)}; }
LINATTN_INLINE V scale_2n(V p, V n) { return V{_mm512_scalef_ps(p.v, n.v)}; }  // denormal results are rounded once

LINATTN_INLINE V from_bits(__m256i x) {
  return V{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
LINATTN_INLINE __m256i bf16_bits(V a) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  __m512i u = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
  __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
#endif
}
LINATTN_INLINE __m256i f16_bits(V a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
LINATTN_INLINE V load_n(const float* p, int n) { return n == V::W ? load(p) : V{_mm512_maskz_loadu_ps(lanes(n), p)}; }
LINATTN_INLINE __m256i load_16(const void* p, int n) {
  return n == V::W ? _mm256_loadu_si256(static_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(lanes(n), p);
}
LINATTN_INLINE V load_n(const bf16* p, int n) { return from_bits(load_16(p, n)); }
LINATTN_INLINE V load_n(const f16* p, int n) { return V{_mm512_cvtph_ps(load_16(p, n))}; }
LINATTN_INLINE void store_16(void* p, __m256i x, int n) {
  if (n == V::W)
    _mm256_storeu_si256(static_cast<__m256i*>(p), x);
  else
    _mm256_mask_storeu_epi16(p, lanes(n), x);
}
LINATTN_INLINE void store_n(float* p, V a, int n) {
  if (n == V::W)
    store(p, a);
  else
    _mm512_mask_storeu_ps(p, lanes(n), a.v);
}
LINATTN_INLINE void store_n(bf16* p, V a, int n) { store_16(p, bf16_bits(a), n); }
LINATTN_INLINE void store_n(f16* p, V a, int n) { store_16(p, f16_bits(a), n); }
// Full registers past the caches; p aligned to the register's stored size.
LINATTN_INLINE void stream(float* p, V a) { _mm512_stream_ps(p, a.v); }
LINATTN_INLINE void stream(bf16* p, V a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bf16_bits(a)); }
LINATTN_INLINE void stream(f16* p, V a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), f16_bits(a)); }
LINATTN_INLINE void stream_fence() { _mm_sfence(); }

// dst[c][r] = src[r][c] for a block of W x W 4-byte units.
constexpr bool kTransposes = true;
LINATTN_INLINE void transpose_block(const uint32_t* src, int64_t ld_src, uint32_t* dst, int64_t ld_dst) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(src + i * ld_src);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + j]: column 4 b + j of rows i .. i + 3 in the 128 bits b
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    __m512i even2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    __m512i odd2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    _mm512_storeu_si512(dst + j * ld_dst, _mm512_shuffle_i32x4(even, even2, 0x88));
    _mm512_storeu_si512(dst + (4 + j) * ld_dst, _mm512_shuffle_i32x4(odd, odd2, 0x88));
    _mm512_storeu_si512(dst + (8 + j) * ld_dst, _mm512_shuffle_i32x4(even, even2, 0xdd));
    _mm512_storeu_si512(dst + (12 + j) * ld_dst, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
  }
}

#elif defined(__AVX2__)
// --------------------------------------------------------------------------------------------------- AVX2
struct V {
  static constexpr int W = 8;
  __m256 v;
};
LINATTN_INLINE V zero() { return V{_mm256_setzero_ps()}; }
LINATTN_INLINE V set1(float x) { return V{_mm256_set1_ps(x)}; }
LINATTN_INLINE V load(const void* p) { return V{_mm256_loadu_ps(static_cast<const float*>(p))}; }
LINATTN_INLINE void store(void* p, V a) { _mm256_storeu_ps(static_cast<float*>(p), a.v); }
LINATTN_INLINE V fma(V a, V b, V c) { return V{_mm256_fmadd_ps(a.v, b.v, c.v)}; }
LINATTN_INLINE V operator*(V a, V b) { return V{_mm256_mul_ps(a.v, b.v)}; }
LINATTN_INLINE V operator+(V a, V b) { return V{_mm256_add_ps(a.v, b.v)}; }
LINATTN_INLINE V operator-(V a, V b) { return V{_mm256_sub_ps(a.v, b.v)}; }
LINATTN_INLINE V vmax(V a, V b) { return V{_mm256_max_ps(a.v, b.v)}; }
LINATTN_INLINE V vmin(V a, V b) { return V{_mm256_min_ps(a.v, b.v)}; }
LINATTN_INLINE float hsum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
LINATTN_INLINE void hsum4(const V (&a)[4], float* out) {
  __m256 x = _mm256_add_ps(_mm256_unpacklo_ps(a[0].v, a[1].v), _mm256_unpackhi_ps(a[0].v, a[1].v));
  __m256 y = _mm256_add_ps(_mm256_unpacklo_ps(a[2].v, a[3].v), _mm256_unpackhi_ps(a[2].v, a[3].v));
  __m256 s = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
LINATTN_INLINE V if_positive(V x, V a, V b) {
  return V{_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_GT_OQ))};
}
LINATTN_INLINE V round_even(V t) { return V{_mm256_round_ps(t.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
LINATTN_INLINE V power_2(__m256i n) {
  return V{_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23))};
}
LINATTN_INLINE V scale_2n(V p, V n) {  // n in [-252, 252]: two factors, so that results below 2^-126 stay gradual
  __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  return p * power_2(half) * power_2(_mm256_sub_epi32(whole, half));
}
LINATTN_INLINE __m256i lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LINATTN_INLINE __m128i bf16_bits(V a) {
  __m256i u = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
  __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  r = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
LINATTN_INLINE __m128i f16_bits(V a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
LINATTN_INLINE V load_n(const float* p, int n) { return n == V::W ? load(p) : V{_mm256_maskload_ps(p, lanes(n))}; }
LINATTN_INLINE __m128i load_16(const void* p, int n) {
  if (n == V::W) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  uint16_t part[8] = {};
  memcpy(part, p, static_cast<size_t>(n) * 2);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(part));
}
LINATTN_INLINE V load_n(const bf16* p, int n) {
  return V{_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(p, n)), 16))};
}
LINATTN_INLINE V load_n(const f16* p, int n) { return V{_mm256_cvtph_ps(load_16(p, n))}; }
LINATTN_INLINE void store_16(void* p, __m128i x, int n) {
  if (n == V::W) {
    _mm_storeu_si128(static_cast<__m128i*>(p), x);
  } else {
    uint16_t part[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(part), x);
    memcpy(p, part, static_cast<size_t>(n) * 2);
  }
}
LINATTN_INLINE void store_n(float* p, V a, int n) {
  if (n == V::W)
    store(p, a);
  else
    _mm256_maskstore_ps(p, lanes(n), a.v);
}
LINATTN_INLINE void store_n(bf16* p, V a, int n) { store_16(p, bf16_bits(a), n); }
LINATTN_INLINE void store_n(f16* p, V a, int n) { store_16(p, f16_bits(a), n); }
LINATTN_INLINE void stream(float* p, V a) { _mm256_stream_ps(p, a.v); }
LINATTN_INLINE void stream(bf16* p, V a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), bf16_bits(a)); }
LINATTN_INLINE void stream(f16* p, V a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), f16_bits(a)); }
LINATTN_INLINE void stream_fence() { _mm_sfence(); }

constexpr bool kTransposes = true;
LINATTN_INLINE void transpose_block(const uint32_t* src, int64_t ld_src, uint32_t* dst, int64_t ld_dst) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(src + i * ld_src));
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {  // r[i + j]: column 4 b + j of rows i .. i + 3 in the 128 bits b
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(reinterpret_cast<float*>(dst + j * ld_dst), _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(dst + (4 + j) * ld_dst), _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
  }
}

#else
// ----------------------------------------------------------------------------------- baseline: any machine
typedef float float4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));
typedef uint32_t uint4 __attribute__((vector_size(16)));
typedef uint16_t ushort4 __attribute__((vector_size(8)));
struct V {
  static constexpr int W = 4;
  float4 v;
};
LINATTN_INLINE V zero() { return V{float4{0, 0, 0, 0}}; }
LINATTN_INLINE V set1(float x) { return V{float4{x, x, x, x}}; }
LINATTN_INLINE V load(const void* p) {
  V a;
  memcpy(&a.v, p, sizeof(a.v));
  return a;
}
LINATTN_INLINE void store(void* p, V a) { memcpy(p, &a.v, sizeof(a.v)); }
LINATTN_INLINE V fma(V a, V b, V c) {
#ifdef __aarch64__
  return V{(float4)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
#else
  return V{a.v * b.v + c.v};  // two roundings
#endif
}
LINATTN_INLINE V operator*(V a, V b) { return V{a.v * b.v}; }
LINATTN_INLINE V operator+(V a, V b) { return V{a.v + b.v}; }
LINATTN_INLINE V operator-(V a, V b) { return V{a.v - b.v}; }
LINATTN_INLINE V vmax(V a, V b) { return V{a.v > b.v ? a.v : b.v}; }
LINATTN_INLINE V vmin(V a, V b) { return V{a.v < b.v ? a.v : b.v}; }
LINATTN_INLINE float hsum(V a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
LINATTN_INLINE void hsum4(const V (&a)[4], float* out) {
  for (int r = 0; r < 4; ++r) out[r] = hsum(a[r]);
}
LINATTN_INLINE V if_positive(V x, V a, V b) { return V{x.v > zero().v ? a.v : b.v}; }
LINATTN_INLINE V round_even(V t) {  // |t| < 2^22: adding 1.5 * 2^23 leaves no fraction bits
  V magic = set1(0x1.8p23f);
  return (t + magic) - magic;
}
LINATTN_INLINE V scale_2n(V p, V n) {  // n in [-252, 252], two factors as in AVX2
  int4 whole = __builtin_convertvector(n.v, int4), half = whole >> 1;
  return p * V{(float4)((half + 127) << 23)} * V{(float4)((whole - half + 127) << 23)};
}
LINATTN_INLINE uint4 bits(V a) { return (uint4)a.v; }
LINATTN_INLINE V from_bits(uint4 x) { return V{(float4)x}; }
LINATTN_INLINE uint4 select(int4 mask, uint4 a, uint4 b) { return mask ? a : b; }
LINATTN_INLINE V load_n(const float* p, int n) {
  if (n == V::W) return load(p);
  V a = zero();
  memcpy(&a.v, p, static_cast<size_t>(n) * 4);
  return a;
}
LINATTN_INLINE uint4 load_16(const void* p, int n) {
  ushort4 x = {0, 0, 0, 0};
  if (n == V::W)
    memcpy(&x, p, 8);
  else
    memcpy(&x, p, static_cast<size_t>(n) * 2);
  return __builtin_convertvector(x, uint4);
}
LINATTN_INLINE V load_n(const bf16* p, int n) { return from_bits(load_16(p, n) << 16); }
LINATTN_INLINE V load_n(const f16* p, int n) {
  uint4 h = load_16(p, n), mag = h & 0x7fffu;
  uint4 normal = (mag << 13) + (112u << 23);
  uint4 special = (mag << 13) | 0x7f800000u;           // inf, NaN
  V tiny = from_bits(mag | 0x3f000000u) - set1(0.5f);  // denormal: mag * 2^-24, exactly
  uint4 r = select(mag >= 0x7c00u, special, select(mag < 0x400u, bits(tiny), normal));
  return from_bits(r | ((h & 0x8000u) << 16));
}
LINATTN_INLINE void store_16(void* p, uint4 x, int n) {
  ushort4 h = __builtin_convertvector(x, ushort4);
  if (n == V::W)
    memcpy(p, &h, 8);
  else
    memcpy(p, &h, static_cast<size_t>(n) * 2);
}
LINATTN_INLINE void store_n(float* p, V a, int n) {
  if (n == V::W)
    store(p, a);
  else
    memcpy(p, &a.v, static_cast<size_t>(n) * 4);
}
LINATTN_INLINE void store_n(bf16* p, V a, int n) {
  uint4 u = bits(a), r = u + 0x7fffu + ((u >> 16) & 1u);
  store_16(p, select(a.v == a.v, r, u | 0x400000u) >> 16, n);
}
LINATTN_INLINE void store_n(f16* p, V a, int n) {
  uint4 u = bits(a), mag = u & 0x7fffffffu;
  uint4 normal = (mag + 0xfffu + ((mag >> 13) & 1u) - (112u << 23)) >> 13;
  uint4 tiny = bits(from_bits(mag) + set1(0.5f)) - 0x3f000000u;  // the addition rounds to multiples of 2^-24
  uint4 r = select(mag < 0x38800000u, tiny, normal);
  r = select(mag >= 0x477ff000u, uint4{} + 0x7c00u, r);  // 65520 and above round to inf
  r = select(mag > 0x7f800000u, 0x7e00u | ((mag >> 13) & 0x3ffu), r);
  store_16(p, r | ((u >> 16) & 0x8000u), n);
}
template <class T>
LINATTN_INLINE void stream(T* p, V a) {
  store_n(p, a, V::W);
}
LINATTN_INLINE void stream_fence() {}
constexpr bool kTransposes = false;
LINATTN_INLINE void transpose_block(const uint32_t*, int64_t, uint32_t*, int64_t) {}
#endif

// Stores a full register as bfloat16 and gives back what was stored.
LINATTN_INLINE V store_rounded(bf16* p, V a) {
#ifdef __AVX512F__
  __m256i x = bf16_bits(a);
  store_16(p, x, V::W);
  return from_bits(x);
#else
  store_n(p, a, V::W);
  return load_n(p, V::W);
#endif
}

LINATTN_INLINE V broadcast(const void* p) {
  float x;
  memcpy(&x, p, 4);
  return set1(x);
}

// exp(x) for x <= 0 (anything may come out for x > 0). -inf gives 0, NaN gives NaN, results below 2^-126 are gradual.
// Degree 6 reduces the argument by ln 2 in two parts (high part exact for |n| < 512) and is good to about 1 ulp;
// degrees 4 and 3 (2.6e-6 and 7.5e-5, on top of 2^-24 |x|) are for results that are rounded to 11 or 8 bits anyway.
// Coefficients: minimax of the relative error, fitted in float64.
// N registers advance together, step by step: one alone is a chain of some 50 cycles, and a processor's schedulers are
// too small to find the next ones behind it.
#define LINATTN_EACH(i, N) _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
template <int DEGREE, int N>
LINATTN_INLINE void exp_neg(V (&x)[N]) {
  V n[N], r[N], p[N];
  LINATTN_EACH(i, N) x[i] = vmax(set1(-104.0f), x[i]);  // exp(-104) rounds to 0
#if !defined(__AVX512F__)
  LINATTN_EACH(i, N) x[i] = vmin(zero(), x[i]);  // scale_2n must not overflow in lanes nobody wants
#endif
  LINATTN_EACH(i, N) r[i] = x[i] * set1(0x1.715476p0f);
  LINATTN_EACH(i, N) n[i] = round_even(r[i]);
  if constexpr (DEGREE == 6) {
    LINATTN_EACH(i, N) r[i] = fma(n[i], set1(-0x1.62e4p-1f), x[i]);
    LINATTN_EACH(i, N) r[i] = fma(n[i], set1(-0x1.7f7d1cp-20f), r[i]);
    LINATTN_EACH(i, N) p[i] = fma(set1(0x1.6a23dp-10f), r[i], set1(0x1.123a2p-7f));
    LINATTN_EACH(i, N) p[i] = fma(p[i], r[i], set1(0x1.5558f2p-5f));
    LINATTN_EACH(i, N) p[i] = fma(p[i], r[i], set1(0x1.555492p-3f));
    LINATTN_EACH(i, N) p[i] = fma(p[i], r[i], set1(0x1.fffffcp-2f));
    LINATTN_EACH(i, N) p[i] = p[i] * r[i];
    LINATTN_EACH(i, N) p[i] = fma(p[i], r[i], r[i]) + set1(1.0f);
  } else if constexpr (DEGREE == 4) {
    LINATTN_EACH(i, N) r[i] = fma(x[i], set1(0x1.715476p0f), zero() - n[i]);
    LINATTN_EACH(i, N) p[i] = fma(set1(0x1.39976ep-7f), r[i], set1(0x1.ca151ep-5f));
    LINATTN_EACH(i, N) p[i] = fma(p[i], r[i], set1(0x1.ec06ep-3f));
    LINATTN_EACH(i, N) p[i] = fma(p[i], r[i], set1(0x1.62e0dcp-1f));
    LINATTN_EACH(i, N) p[i] = fma(p[i], r[i], set1(0x1.ffffe8p-1f));
  } else {
    static_assert(DEGREE == 3);
    LINATTN_EACH(i, N) r[i] = r[i] - n[i];
    LINATTN_EACH(i, N) p[i] = fma(set1(0x1.c3f6aep-5f), r[i], set1(0x1.f0df58p-3f));
    LINATTN_EACH(i, N) p[i] = fma(p[i], r[i], set1(0x1.62f322p-1f));
    LINATTN_EACH(i, N) p[i] = fma(p[i], r[i], set1(0x1.fff68ep-1f));
  }
  LINATTN_EACH(i, N) x[i] = scale_2n(p[i], n[i]);
}

// Degree of exp that a storage type deserves.
template <class T>
constexpr int exp_degree = 6;
template <>
constexpr int exp_degree<f16> = 4;
template <>
constexpr int exp_degree<bf16> = 3;

// Feature maps. Codes as in the op schema.
constexpr int kIdentity = 0, kRelu = 1, kElu1 = 2;
template <int MAP, int DEGREE, int N>
LINATTN_INLINE void phi(V (&x)[N]) {
  if constexpr (MAP == kRelu) LINATTN_EACH(i, N) x[i] = vmax(zero(), x[i]);
  if constexpr (MAP == kElu1) {
    V e[N];
    LINATTN_EACH(i, N) e[i] = x[i];
    exp_neg<DEGREE>(e);
    LINATTN_EACH(i, N) x[i] = if_positive(x[i], x[i] + set1(1.0f), e[i]);
  }
}
// phi'(x) from f = phi(x): elu1 has phi' = 1 where f > 1 and phi' = f (an exponential, <= 1) elsewhere.
template <int MAP>
LINATTN_INLINE V phi_grad(V f) {
  if constexpr (MAP == kIdentity) return set1(1.0f);
  if constexpr (MAP == kRelu) return if_positive(f, set1(1.0f), zero());
  if constexpr (MAP == kElu1) return vmin(set1(1.0f), f);
}

// How a multiply step reads its operands: always 4-byte units.
struct F32 {
  static constexpr int U = 1;  // values per unit
  static LINATTN_INLINE V mac(V c, V a, V b) { return fma(a, b, c); }
};
#ifdef __AVX512BF16__
struct BF16P {
  static constexpr int U = 2;
  static LINATTN_INLINE V mac(V c, V a, V b) { return V{_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)}; }
};
// Lane i of the result: bf16(a_i) in the low half, bf16(b_i) in the high half.
LINATTN_INLINE V pair(V a, V b) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
  return V{_mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(order), both))};
}
// Two stored rows interleaved bit by bit, no rounding. b may be null: zeros.
LINATTN_INLINE V pair_rows(const bf16* a, const bf16* b, int n) {
  __m512i x = _mm512_cvtepu16_epi32(load_16(a, n));
  __m512i y = b ? _mm512_cvtepu16_epi32(load_16(b, n)) : _mm512_setzero_si512();
  return V{_mm512_castsi512_ps(_mm512_or_si512(x, _mm512_slli_epi32(y, 16)))};
}
LINATTN_INLINE V low_half(V p) { return V{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(p.v), 16))}; }
LINATTN_INLINE V high_half(V p) {
  return V{_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(p.v), _mm512_set1_epi32(-65536)))};
}
#endif

}  // namespace LINATTN_ISA
}  // namespace linattn
