// Tiles, work and scratch shared by the kernel files of one instruction set (compiled per ISA like simd.h).
//
//   gemm<M, AT>    C[rows, columns] = A B in register blocks; the caller's epilogue gets each finished block.
//                  A enters by 4-byte broadcasts, B by vector loads; one cache line of the caller's next chunk is
//                  prefetched per step, so that DRAM is busy while the registers multiply
//   for_each_task  work by an atomic counter over a Parallel
//   Scratch        one block of memory per call
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "parallel.h"
#include "simd.h"

namespace linattn {
namespace LINATTN_ISA {

template <class T>
LINATTN_INLINE constexpr T lesser(T a, T b) {
  return a < b ? a : b;
}
template <class T>
LINATTN_INLINE constexpr T greater(T a, T b) {
  return a < b ? b : a;
}
template <class T>
LINATTN_INLINE constexpr T divide_up(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
LINATTN_INLINE constexpr T round_up(T a, T b) {
  return divide_up(a, b) * b;
}

// How values of a storage type are multiplied.
template <class T>
struct Multiply {
  using M = F32;
};
#ifdef __AVX512BF16__
template <>
struct Multiply<bf16> {
  using M = BF16P;
};
#endif

// Register blocks: kMaxVectors columns of V times block_rows(vectors) rows of accumulators. Measured on Zen 5: 4x4 for
// AVX-512 (6x4 and 7x4 spill or starve), 4x2 for the 16 registers of AVX2 and SSE (6x2 spills).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxVectors = 4;
constexpr int block_rows(int vectors) { return vectors == 4 ? 4 : 8; }
#else
constexpr int kMaxVectors = 2;
constexpr int block_rows(int vectors) { return vectors == 2 ? 4 : 8; }
#endif
constexpr int kRowPad = 8;   // every block_rows divides it
constexpr int kColPad = 16;  // every V::W divides it

// The part of memory that will be read next: `rows` rows of `bytes` bytes, `stride` bytes apart, walked down the rows
// one cache line wide, so that step k of a multiply loop touches row k. Rows that follow each other without a gap are
// walked as lines of one long row. An empty Prefetch points at a line that is in the cache anyway.
struct Prefetch {
  const char* next = nullptr;
  int64_t step = 0;  // bytes from one prefetch to the next
  int64_t left = 0;  // prefetches left in this column of lines
  int64_t rows = 0;  // prefetches per column of lines
  int columns = 0;   // columns of lines left after this one
  const char* top = nullptr;

  LINATTN_INLINE void aim(const void* p, int64_t n_rows, int64_t bytes, int64_t stride) {
    top = next = static_cast<const char*>(p);
    int64_t lines = divide_up<int64_t>(bytes, 64);
    step = stride, rows = n_rows, columns = static_cast<int>(lines) - 1;
    if (stride == bytes) step = 64, rows = divide_up<int64_t>(n_rows * bytes, 64), columns = 0;
    left = rows;
  }
  // Pointer and step for a loop of `steps` prefetches; it may run past the column, which only fetches a later row.
  LINATTN_INLINE bool take(int steps, const char*& p, int64_t& by) {
    if (left <= 0) {
      if (columns <= 0) return false;
      --columns;
      next = top += 64;
      left = rows;
    }
    p = next, by = step;
    next += steps * step;
    left -= steps;
    return true;
  }
};

constexpr int kPrefetches = 4;  // what a gemm is handed, drained in turn

// acc[R][N] = sum over k of A (broadcast units) x B (vectors). AT: A is [k][row], else [row][k].
template <class M, int R, int N, bool AT>
LINATTN_INLINE void multiply(V (&acc)[R][N], int depth, const uint32_t* A, int64_t lda, const uint32_t* B, int64_t ldb,
                             const char* pf, int64_t pf_step) {
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[i][j] = zero();
#pragma GCC unroll 2
  for (int k = 0; k < depth; ++k) {
    V b[N];
    __builtin_prefetch(pf, 0, 2);
    pf += pf_step;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) b[j] = load(B + j * V::W);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      V a = broadcast(AT ? A + i : A + i * lda);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = M::mac(acc[i][j], a, b[j]);
    }
    A += AT ? lda : 1;
    B += ldb;
  }
}

// One panel of N vectors: every block of rows, then epilogue(acc, first row, first column). rows may exceed what is
// valid by less than kRowPad: A must be readable there, the epilogue drops what it does not want.
template <class M, bool AT, int N, class Epilogue>
__attribute__((noinline)) void gemm_panel(int rows, int column, int depth, const uint32_t* A, int64_t lda,
                                          const uint32_t* B, int64_t ldb, const Epilogue& epilogue, Prefetch* pf) {
  constexpr int R = block_rows(N);
  for (int r = 0; r < rows; r += R) {
    const char* p = reinterpret_cast<const char*>(B);
    int64_t by = 0;
    for (int i = 0; pf && i < kPrefetches && !pf[i].take(depth, p, by);) ++i;
    V acc[R][N];
    multiply<M, R, N, AT>(acc, depth, A + (AT ? r : r * lda), lda, B + column, ldb, p, by);
    epilogue(acc, r, column);
  }
}

// C[rows, vectors * W] = A[rows, depth units] B[depth units, ...]. pf: null or kPrefetches of them.
template <class M, bool AT, class Epilogue>
void gemm(int rows, int vectors, int depth, const uint32_t* A, int64_t lda, const uint32_t* B, int64_t ldb,
          const Epilogue& epilogue, Prefetch* pf = nullptr) {
  for (int v = 0; v < vectors;) {
    int left = vectors - v,
        n = left == kMaxVectors + 1 && kMaxVectors > 2 ? kMaxVectors - 1 : lesser(left, kMaxVectors);
    int column = v * V::W;
    if (n == 1) gemm_panel<M, AT, 1>(rows, column, depth, A, lda, B, ldb, epilogue, pf);
    if (n == 2) gemm_panel<M, AT, 2>(rows, column, depth, A, lda, B, ldb, epilogue, pf);
    if constexpr (kMaxVectors > 2) {
      if (n == 3) gemm_panel<M, AT, 3>(rows, column, depth, A, lda, B, ldb, epilogue, pf);
      if (n == 4) gemm_panel<M, AT, 4>(rows, column, depth, A, lda, B, ldb, epilogue, pf);
    }
    v += n;
  }
}

// Epilogues: what becomes of a finished block.
struct AddTo {  // C += block
  float* C;
  int64_t ld;
  template <int R, int N>
  LINATTN_INLINE void operator()(V (&acc)[R][N], int r, int column) const {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        float* c = C + (r + i) * ld + column + j * V::W;
        store(c, load(c) + acc[i][j]);
      }
  }
};

struct StoreTo {  // C = block
  float* C;
  int64_t ld;
  template <int R, int N>
  LINATTN_INLINE void operator()(V (&acc)[R][N], int r, int column) const {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) store(C + (r + i) * ld + column + j * V::W, acc[i][j]);
  }
};

// dst[c][r] = src[r][c], 4-byte units.
inline void transpose_units(const uint32_t* src, int64_t ld_src, int rows, int columns, uint32_t* dst, int64_t ld_dst) {
  constexpr int B = kTransposes ? V::W : 16;
  for (int r0 = 0; r0 < rows; r0 += B) {
    int c0 = 0;
    if (kTransposes && r0 + B <= rows)
      for (; c0 + B <= columns; c0 += B)
        transpose_block(src + r0 * ld_src + c0, ld_src, dst + c0 * ld_dst + r0, ld_dst);
    for (int c = c0; c < columns; ++c)
      for (int r = r0; r < lesser(r0 + B, rows); ++r) dst[c * ld_dst + r] = src[r * ld_src + c];
  }
}

// f(slot, task) for every task in [0, tasks), taken from one counter by at most parallel.threads slots. Which slot gets
// which task is chance: results may depend on the task only.
template <class F>
void for_each_task(const Parallel& parallel, int64_t tasks, const F& f) {
  if (tasks <= 0) return;
  struct Work {
    const F* f;
    int64_t next, tasks;
  } work{&f, 0, tasks};
  auto body = [](void* context, int slot) {
    Work* w = static_cast<Work*>(context);
    for (int64_t t; (t = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->tasks;) (*w->f)(slot, t);
  };
  int slots = static_cast<int>(lesser<int64_t>(parallel.threads, tasks));
  if (slots <= 1)
    body(&work, 0);
  else
    parallel.run(slots, body, &work);
}

// A bump allocator over one malloc per call: sizes are reserved first, then the block is made. Pieces start on a cache
// line. With LINATTN_POISON the block starts as NaN, so that anything read before it is written shows.
struct Scratch {
  char* block = nullptr;
  char* base = nullptr;
  int64_t size = 0;
  LINATTN_INLINE int64_t reserve(int64_t bytes) {
    int64_t at = size;
    size += round_up<int64_t>(bytes, 64);
    return at;
  }
  LINATTN_INLINE bool make() {
    block = static_cast<char*>(malloc(static_cast<size_t>(size) + 64));
    if (!block) return false;
    base = block + (64 - reinterpret_cast<uintptr_t>(block) % 64);
#ifdef LINATTN_POISON
    memset(block, 0xff, static_cast<size_t>(size) + 64);
#endif
    return true;
  }
  LINATTN_INLINE void drop() { free(block); }
  template <class T>
  LINATTN_INLINE T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base + offset);
  }
};

}  // namespace LINATTN_ISA
}  // namespace linattn
