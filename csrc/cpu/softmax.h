// What the softmax kernels share, beside tile.h (compiled per instruction set like it): one side of the scores in the
// lanes of registers, the other in rows.
//
//   rows1 [rows][Dp / U]       pack_row: a product contracts over D, units are values that lie side by side
//   tall  [rows / U][Dp]       pack_pair: a product contracts over the rows, units pair two of them (U = 2)
//   P     [rows / U][lanes]    store_weights: the operand that meets a tall one
//   gemm_rows                  as gemm, with rows that lie anywhere in memory
#pragma once
#include "tensor.h"
#include "tile.h"

namespace linattn {
namespace LINATTN_ISA {

constexpr float kLowest = -3.4028235e38f;
constexpr float kInfinity = __builtin_inff();

template <class T>
LINATTN_INLINE T* at(const View& x, int64_t b, int64_t h, int64_t n) {
  return static_cast<T*>(x.data) + (b * x.stride_b + h * x.stride_h + n * x.stride_n);
}

struct Bump {  // measures (base null) or deals out a block
  char* base = nullptr;
  int64_t used = 0;
  template <class X>
  X* take(int64_t n) {
    X* p = base ? reinterpret_cast<X*>(base + used) : nullptr;
    used += round_up<int64_t>(n * static_cast<int64_t>(sizeof(X)), 64);
    return p;
  }
};

// ---------------------------------------------------------------------------------------------------------- operands

template <class T>
void pack_row(const T* p, int D, uint32_t* A) {
  constexpr int U = Multiply<T>::M::U, W = V::W;
  auto part = [&](int j, int w) LINATTN_INLINE_LAMBDA {
    if constexpr (U == 1) store(A + j, load_n(p + j, w));
#ifdef __AVX512BF16__
    if constexpr (U == 2) store_16(reinterpret_cast<bf16*>(A) + j, load_16(p + j, w), W);
#endif
  };
  int j = 0;
  for (; j + W <= D; j += W) part(j, W);
  if (j < D) part(j, D - j);
}

#ifdef __AVX512BF16__
// Two rows as D units; second may be null: zeros.
inline void pack_pair(const bf16* first, const bf16* second, int D, uint32_t* A) {
  const int full = second ? D / V::W * V::W : 0;
  for (int j = 0; j < full; j += V::W) store(A + j, pair_rows(first + j, second + j, V::W));
  for (int j = full; j < D; j += V::W)
    store(A + j, pair_rows(first + j, second ? second + j : nullptr, lesser(V::W, D - j)));
}
#endif

// Rows i .. i + 3 of an operand P, W lanes from column on.
template <int U>
LINATTN_INLINE void store_weights(uint32_t* P, int ld, int i, int column, const V (&x)[4]) {
  if constexpr (U == 1) {
    LINATTN_EACH(r, 4) store(P + (i + r) * ld + column, x[r]);
  }
#ifdef __AVX512BF16__
  if constexpr (U == 2) {
    store(P + i / 2 * ld + column, pair(x[0], x[1]));
    store(P + (i / 2 + 1) * ld + column, pair(x[2], x[3]));
  }
#endif
}

// ------------------------------------------------------------------------------------------------- rows in place

// C[rows, vectors * W] = A B as gemm does, the rows of A where they lie: A[row] points at units, for the rows up to the
// next multiple of kRowPad.
template <class M, int N, class Epilogue>
__attribute__((noinline)) void gemm_rows_panel(int rows, int column, int depth, const char* const* A, const uint32_t* B,
                                               int64_t ldb, const Epilogue& epilogue) {
  constexpr int R = block_rows(N);
  for (int r = 0; r < rows; r += R) {
    const char* a[R];
    V acc[R][N];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      a[i] = A[r + i];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = zero();
    }
    const uint32_t* p = B + column;
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k, p += ldb) {
      V b[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) b[j] = load(p + j * V::W);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        V x = broadcast(a[i] + 4 * k);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[i][j] = M::mac(acc[i][j], x, b[j]);
      }
    }
    epilogue(acc, r, column);
  }
}
template <class M, class Epilogue>
void gemm_rows(int rows, int vectors, int depth, const char* const* A, const uint32_t* B, int64_t ldb,
               const Epilogue& epilogue) {
  constexpr int N = kMaxVectors;
  static_assert(N == 4 || N == 2);
  int v = 0;
  for (; v + N <= vectors; v += N) gemm_rows_panel<M, N>(rows, v * V::W, depth, A, B, ldb, epilogue);
  for (; v < vectors; v += 2) gemm_rows_panel<M, 2>(rows, v * V::W, depth, A, B, ldb, epilogue);
}

// --------------------------------------------------------------------------------------------------------- epilogues

struct Rescale {  // C = C * alpha (per column) + block
  float* C;
  int64_t ld;
  const float* alpha;
  template <int R, int N>
  LINATTN_INLINE void operator()(V (&acc)[R][N], int r, int column) const {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      V a = load(alpha + column + j * V::W);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        float* c = C + (r + i) * ld + column + j * V::W;
        store(c, fma(load(c), a, acc[i][j]));
      }
    }
  }
};

// Fetches the rows of the next chunk into L2, some at a time.
struct Ahead {
  const int64_t* next = nullptr;  // its tokens
  int n = 0;
  const char *x1 = nullptr, *x2 = nullptr;  // token 0 of both tensors
  int64_t stride1 = 0, stride2 = 0;         // bytes
  int bytes = 0, at = 0;
  LINATTN_INLINE void fetch(int rows) {
    for (int end = lesser(at + rows, n); at < end; ++at)
      for (int i = 0; i < bytes; i += 64) {
        __builtin_prefetch(x1 + next[at] * stride1 + i, 0, 2);
        __builtin_prefetch(x2 + next[at] * stride2 + i, 0, 2);
      }
  }
};
template <class E>
struct Fetching {  // an epilogue that also fetches `rows` rows per block
  const E& epilogue;
  Ahead& ahead;
  int rows;
  template <int R, int N>
  LINATTN_INLINE void operator()(V (&acc)[R][N], int r, int column) const {
    ahead.fetch(rows);
    epilogue(acc, r, column);
  }
};

}  // namespace LINATTN_ISA
}  // namespace linattn
