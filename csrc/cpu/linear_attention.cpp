// Bidirectional linear attention, forward and backward (formulas: linear_attention.h; gradients: docs).
//
// Work goes by chunks of 64 tokens, all heads of a group after each other: with heads adjacent in memory, (B, N, H, D),
// a chunk of a group is one stretch of memory, and the group's states (D x E floats each) stay in L2 beside it.
//
//   state   phi(k) and v of a chunk are copied to scratch (16 KiB each at D = 64: L1), then kv[D, E] += phi(k)^T v.
//           Bytes: k and v once. A segment of tokens makes a partial state; partial states are added in segment order.
//   finish  adds the partial states, packs scale * kv and the mean key m = k_sum / count.
//   apply   phi(q) of a chunk to scratch, z = phi(q) m, then out = (phi(q) kv) / z from registers to memory.
//           Bytes: q once, out once.
//   Where that is fewer operations (few keys), (phi(q) phi(k)^T) v replaces the three.
//   apply_backward   w = grad_out kv^T, a pass over rows for z, dz and grad_q, then grad_kv += (phi(q) / z)^T grad_out.
//   state_backward   grad_v = phi(k) grad_kv and w = v grad_kv^T, then a pass over rows for grad_k.
//
// The floor is memory: 4 N (D + E) / 2 values against 4 N D E operations, 2 D flop per value and direction, so the next
// chunk is prefetched line by line inside the multiply loops. All products are one register block (tile.h).
// Segments depend on the sizes only, so results are the same bits for any thread count, batch and stride order.
// Sums are two-level (64 tokens in registers, then chunks), which keeps float32 error near that of a blocked sum.
// bfloat16 multiplies as pairs where the machine has vdpbf16ps, else it is converted; float16 is always converted.
#include "linear_attention.h"

#include "tile.h"

namespace linattn {
namespace LINATTN_ISA {
namespace {

constexpr int kChunk = 64;                  // tokens per step; a multiple of kRowPad and of every unit
constexpr int64_t kRun = 512;               // tokens per task where nothing is reduced
constexpr int64_t kMaxSegments = 64;        // partial states per head
constexpr int64_t kGroupBytes = 256 << 10;  // states of a head group, a quarter of a 1 MiB L2
constexpr int64_t kStreamBytes = 32 << 20;  // outputs from this size on are stored past the caches
constexpr int64_t kFusedTokens = 4096;      // up to here one task may do all phases of a head

template <int I>
struct Int {
  static constexpr int value = I;
};
template <class F>
LINATTN_INLINE void with_map(int map, const F& f) {
  if (map == kElu1)
    f(Int<kElu1>{});
  else if (map == kRelu)
    f(Int<kRelu>{});
  else
    f(Int<kIdentity>{});
}

// ---------------------------------------------------------------------------------------- rows to operands
// Row format, the A side: [row][unit along the head dim]. Tall format, the B side and A^T: [unit along rows][column].
// With one value per unit the two are the same.

// phi of x[n][D] by blocks of four rows and one register: use(row, column, f, rows) gets four registers f, of which
// `rows` are rows of x; the others are zero. Four, so that the exponentials overlap (simd.h).
template <class T, int MAP, class Use>
LINATTN_INLINE void map_rows(const T* x, int64_t stride, int n, int D, const Use& use) {
  auto block = [&](int i, int j, int width, int rows) LINATTN_INLINE_LAMBDA {
    const T* p = x + i * stride + j;
    V f[4];
    LINATTN_EACH(r, 4) f[r] = load_n(p + (r < rows ? r : 0) * stride, width);
    phi<MAP, exp_degree<T>>(f);
    LINATTN_EACH(r, 4) if (r >= rows) f[r] = zero();
    use(i, j, f, rows);
  };
  for (int i = 0; i < n; i += 4) {
    int rows = lesser(4, n - i), j = 0;
    if (rows == 4)
      for (; j + V::W <= D; j += V::W) block(i, j, V::W, 4);
    for (; j < D; j += V::W) block(i, j, lesser(V::W, D - j), rows);
  }
}

LINATTN_INLINE void add_to(float* p, const V (&f)[4]) { store(p, load(p) + ((f[0] + f[1]) + (f[2] + f[3]))); }

// f[n][ld] = phi(x).
template <class T, int MAP>
void features(const T* x, int64_t stride, int n, int D, float* f, int ld) {
  map_rows<T, MAP>(x, stride, n, D, [&](int i, int j, const V(&y)[4], int rows) LINATTN_INLINE_LAMBDA {
    LINATTN_EACH(r, 4) if (r < rows) store(f + (i + r) * ld + j, y[r]);
  });
}

// Row format of phi(x). With m: z_i = phi(x_i) . m, with sum: sum += phi(x_i); both from the rounded phi.
// z is written up to the next multiple of 4 rows.
template <class M, class T, int MAP>
void pack_rows(const T* x, int64_t stride, int n, int D, uint32_t* A, int lda, const float* m, float* z, float* sum) {
  V dots[4];
  map_rows<T, MAP>(x, stride, n, D, [&](int i, int j, V(&f)[4], int rows) LINATTN_INLINE_LAMBDA {
    LINATTN_EACH(r, 4) if (r < rows) {
      uint32_t* a = A + (i + r) * lda;
      if constexpr (M::U == 1) {
        store(a + j, f[r]);
      } else {
        f[r] = store_rounded(reinterpret_cast<bf16*>(a) + j, f[r]);
        if (D % 2 && j + V::W >= D) reinterpret_cast<bf16*>(a)[D].bits = 0;  // phi(0) is not 0
      }
    }
    if (m) {
      V mean = load(m + j);
      if (j == 0)
        LINATTN_EACH(r, 4) dots[r] = f[r] * mean;
      else
        LINATTN_EACH(r, 4) dots[r] = fma(f[r], mean, dots[r]);
      if (j + V::W >= D) hsum4(dots, z + i);
    }
    if (sum) add_to(sum + j, f);
  });
}

// Tall format of phi(x), and sum += phi(x_i) from the rounded phi.
template <class M, class T, int MAP, bool SUM>
void pack_tall(const T* x, int64_t stride, int n, int D, uint32_t* A, int lda, float* sum) {
  if constexpr (M::U == 1 && MAP == kIdentity && !SUM) {
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < D; j += V::W) store(A + i * lda + j, load_n(x + i * stride + j, lesser(V::W, D - j)));
  } else if constexpr (M::U == 1) {
    map_rows<T, MAP>(x, stride, n, D, [&](int i, int j, const V(&f)[4], int rows) LINATTN_INLINE_LAMBDA {
      LINATTN_EACH(r, 4) if (r < rows) store(A + (i + r) * lda + j, f[r]);
      if (SUM) add_to(sum + j, f);
    });
  }
#ifdef __AVX512BF16__
  if constexpr (M::U == 2 && MAP == kIdentity && !SUM) {  // bits, no arithmetic
    for (int i = 0; i < n; i += 2, A += lda, x += 2 * stride)
      for (int j = 0; j < D; j += V::W)
        store(A + j, pair_rows(x + j, i + 1 < n ? x + stride + j : nullptr, lesser(V::W, D - j)));
  } else if constexpr (M::U == 2) {
    map_rows<T, MAP>(x, stride, n, D, [&](int i, int j, const V(&f)[4], int rows) LINATTN_INLINE_LAMBDA {
      V first = pair(f[0], f[1]), second = pair(f[2], f[3]);
      store(A + i / 2 * lda + j, first);
      if (rows > 2) store(A + (i / 2 + 1) * lda + j, second);
      if (SUM) {
        V rounded[4] = {low_half(first), high_half(first), low_half(second), high_half(second)};
        add_to(sum + j, rounded);
      }
    });
  }
#endif
}

// sum += phi(x_i), no rounding.
template <class T, int MAP>
void add_rows(const T* x, int64_t stride, int n, int D, float* sum) {
  map_rows<T, MAP>(x, stride, n, D, [&](int, int j, const V(&f)[4], int) LINATTN_INLINE_LAMBDA { add_to(sum + j, f); });
}

// z_i = phi(x_i) . m, no rounding; z is written up to the next multiple of 4 rows.
template <class T, int MAP>
void dot_rows(const T* x, int64_t stride, int n, int D, const float* m, float* z) {
  V dots[4];
  map_rows<T, MAP>(x, stride, n, D, [&](int i, int j, const V(&f)[4], int) LINATTN_INLINE_LAMBDA {
    V mean = load(m + j);
    LINATTN_EACH(r, 4) dots[r] = j == 0 ? f[r] * mean : fma(f[r], mean, dots[r]);
    if (j + V::W >= D) hsum4(dots, z + i);
  });
}

// Row format of factor * f, f[rows][ld] floats of which `columns` are valid (the rest of a register counts as zero).
template <class M>
void floats_to_rows(const float* f, int64_t ld, int rows, int columns, float factor, uint32_t* A, int lda) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; j += V::W) {
      V x = load_n(f + i * ld + j, lesser(V::W, columns - j)) * set1(factor);
      if constexpr (M::U == 1)
        store(A + i * lda + j, x);
      else
        store_n(reinterpret_cast<bf16*>(A + i * lda) + j, x, V::W);
    }
}

// Tall format of factor * f.
template <class M>
void floats_to_tall(const float* f, int64_t ld, int rows, int columns, float factor, uint32_t* B, int ldb) {
  for (int i = 0; i < rows; i += M::U, B += ldb)
    for (int j = 0; j < columns; j += V::W) {
      int w = lesser(V::W, columns - j);
      V x = load_n(f + i * ld + j, w) * set1(factor);
      if constexpr (M::U == 1) store(B + j, x);
#ifdef __AVX512BF16__
      if constexpr (M::U == 2)
        store(B + j, pair(x, i + 1 < rows ? load_n(f + (i + 1) * ld + j, w) * set1(factor) : zero()));
#endif
    }
}

// Tall format of the transpose of factor * f: B[unit along columns][row], zero from `rows` to ldb. rows_scratch holds
// rows x (ld_scratch units).
template <class M>
void floats_to_tall_transposed(const float* f, int64_t ld, int rows, int columns, float factor, uint32_t* rows_scratch,
                               int ld_scratch, uint32_t* B, int ldb) {
  floats_to_rows<M>(f, ld, rows, columns, factor, rows_scratch, ld_scratch);
  int units = divide_up(columns, M::U);
  memset(B, 0, sizeof(uint32_t) * static_cast<size_t>(units) * static_cast<size_t>(ldb));
  transpose_units(rows_scratch, ld_scratch, rows, units, B, ldb);
}

// ------------------------------------------------------------------------------------------------ epilogues

template <class T>
struct WriteRows {  // out[row] = factor[row] * block, only what is inside rows x columns
  T* out;
  int64_t stride;
  const float* factor;
  int rows, columns;
  bool streamed;
  template <int R, int N>
  LINATTN_INLINE void operator()(V (&acc)[R][N], int r, int column) const {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      if (r + i >= rows) return;
      V s = set1(factor[r + i]);
      T* o = out + (r + i) * stride + column;
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        if (streamed)
          stream(o + j * V::W, acc[i][j] * s);
        else
          store_n(o + j * V::W, acc[i][j] * s, lesser(V::W, columns - column - j * V::W));
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------ ops

template <class T>
struct Op {
  using M = typename Multiply<T>::M;
  static constexpr int U = M::U, W = V::W;

  const LinearAttentionArgs& a;
  const Parallel& parallel;
  const int D, E;
  const int Dp = round_up(D, kColPad), Ep = round_up(E, kColPad);  // leading dimensions in scratch
  const int Du = divide_up(D, U), Eu = divide_up(E, U);            // units
  const int Dv = divide_up(D, W), Ev = divide_up(E, W);            // registers
  const int64_t heads = a.B * a.H;
  const int64_t state_size = static_cast<int64_t>(Dp) * Ep + Dp;  // floats: kv[Dp][Ep], k_sum[Dp]

  Op(const LinearAttentionArgs& args, const Parallel& p) : a(args), parallel(p), D(args.D), E(args.E) {}

  static T* at(const View& x, int64_t b, int64_t h, int64_t n) {
    return static_cast<T*>(x.data) + (b * x.stride_b + h * x.stride_h + n * x.stride_n);
  }

  // ---- how the work is cut (sizes only, never B, threads or strides, where a sum is cut)

  // Tokens per partial state: partial states cost at most about 5 % of the bytes of q, k, v and out.
  int64_t segment_length(int64_t tokens) const {
    int64_t length = greater<int64_t>(512, 32 * greater(D, E) / static_cast<int>(sizeof(T)));
    return round_up<int64_t>(greater(length, divide_up(tokens, kMaxSegments)), kChunk);
  }

  // Heads that a task takes together: as many as are adjacent and fit, but enough tasks for the threads.
  int64_t group_of(const View& x, int64_t bytes_per_head, int64_t parts) const {
    if (x.stride_h >= x.stride_n) return 1;
    int64_t g = greater<int64_t>(1, lesser<int64_t>(a.H, kGroupBytes / bytes_per_head));
    while (g > 1 && a.B * divide_up(a.H, g) * parts < 3 * parallel.threads) g = divide_up<int64_t>(g, 2);
    return g;
  }

  bool one_task_per_head(int64_t tokens, int64_t segments) const {
    return segments == 1 && tokens <= kFusedTokens && (heads >= parallel.threads || tokens <= 256);
  }

  // f(slot, b, h)
  template <class F>
  void for_each_head(const F& f) const {
    for_each_task(parallel, heads, [&](int slot, int64_t t) { f(slot, t / a.H, t % a.H); });
  }
  // f(slot, b, first head, end head, first part, end part). A task takes several parts that follow each other, because
  // the first chunk of a task comes without prefetch; 8 tasks per thread still balance.
  template <class F>
  void for_each_part(int64_t group, int64_t parts, const F& f) const {
    int64_t groups = divide_up(a.H, group);
    int64_t span = greater<int64_t>(1, lesser(parts, a.B * groups * parts / (8 * parallel.threads)));
    int64_t spans = divide_up(parts, span);
    for_each_task(parallel, a.B * groups * spans, [&](int slot, int64_t t) {
      int64_t g = t / spans % groups, first = t % spans * span;
      f(slot, t / spans / groups, g * group, lesser(a.H, (g + 1) * group), first, lesser(parts, first + span));
    });
  }
  int slots_for(int64_t tasks) const {
    return static_cast<int>(greater<int64_t>(1, lesser<int64_t>(parallel.threads, tasks)));
  }

  // Aim at the chunk that starts at token n, all heads [h0, h1) of it; nothing from `end` on.
  static void aim(Prefetch& pf, const View& x, int64_t b, int64_t h0, int64_t h1, int64_t n, int64_t end, int width) {
    pf = Prefetch{};
    if (n >= end) return;
    int64_t rows = lesser<int64_t>(kChunk, end - n), size = sizeof(T);
    bool adjacent = h1 - h0 == 1 || x.stride_h == width;
    if (adjacent) pf.aim(at(x, b, h0, n), rows, (h1 - h0) * width * size, x.stride_n * size);
  }

  // ---- state

  struct StateScratch {
    uint32_t *k, *v;  // tall
    float* sum;
  };
  int64_t state_scratch_bytes() const { return 4 * (static_cast<int64_t>(kChunk) * (Dp + Ep) + Dp); }
  StateScratch state_scratch(char* p) const {
    auto* k = reinterpret_cast<uint32_t*>(p);
    return {k, k + kChunk * Dp, reinterpret_cast<float*>(k + kChunk * (Dp + Ep))};
  }

  // Partial states of the keys [m0, m1) for the heads [h0, h1); state(h) is where each goes. The caller goes on to
  // `next`.
  template <class State>
  void add_keys(int64_t b, int64_t h0, int64_t h1, int64_t m0, int64_t m1, int64_t next, const StateScratch& s,
                const State& state) const {
    for (int64_t h = h0; h < h1; ++h) memset(state(h), 0, sizeof(float) * static_cast<size_t>(state_size));
    for (int64_t m = m0; m < m1; m += kChunk) {
      int n = static_cast<int>(lesser<int64_t>(kChunk, m1 - m));
      Prefetch pf[kPrefetches];
      aim(pf[0], a.k, b, h0, h1, m + kChunk, next, D);
      aim(pf[1], a.v, b, h0, h1, m + kChunk, next, E);
      for (int64_t h = h0; h < h1; ++h) {
        float *kv = state(h), *k_sum = kv + static_cast<int64_t>(Dp) * Ep;
        memset(s.sum, 0, sizeof(float) * static_cast<size_t>(Dp));
        with_map(a.feature_map, [&](auto map) {
          constexpr int MAP = decltype(map)::value;
          if (a.k_denom.data) {
            pack_tall<M, T, MAP, false>(at(a.k, b, h, m), a.k.stride_n, n, D, s.k, Dp, nullptr);
            add_rows<T, MAP>(at(a.k_denom, b, h, m), a.k_denom.stride_n, n, D, s.sum);
          } else {
            pack_tall<M, T, MAP, true>(at(a.k, b, h, m), a.k.stride_n, n, D, s.k, Dp, s.sum);
          }
        });
        pack_tall<M, T, kIdentity, false>(at(a.v, b, h, m), a.v.stride_n, n, E, s.v, Ep, nullptr);
        for (int j = 0; j < Dp; j += W) store(k_sum + j, load(k_sum + j) + load(s.sum + j));
        gemm<M, true>(D, Ev, divide_up(n, U), s.k, Dp, s.v, Ep, AddTo{kv, Ep}, pf);
      }
    }
  }

  // Adds the partial states behind the first one to it, in order.
  void reduce(float* state, int64_t segments) const {
    for (int64_t s = 1; s < segments; ++s) {
      const float* part = state + s * state_size;
      for (int64_t j = 0; j < state_size; j += W) store(state + j, load(state + j) + load(part + j));
    }
  }
  void write_state(const float* state, int64_t b, int64_t h, float* kv, float* k_sum, float kv_factor,
                   float sum_factor) const {
    int64_t head = b * a.H + h;
    for (int d = 0; d < D; ++d)
      for (int j = 0; j < E; j += W)
        store_n(kv + (head * D + d) * E + j, load(state + d * Ep + j) * set1(kv_factor), lesser(W, E - j));
    const float* sum = state + static_cast<int64_t>(Dp) * Ep;
    for (int j = 0; j < D; j += W) store_n(k_sum + head * D + j, load(sum + j) * set1(sum_factor), lesser(W, D - j));
  }

  // ---- what apply reads: the packed scale * kv and the mean key

  struct Packed {
    uint32_t* kv;  // tall [Du][Ep]
    float* m;      // [Dp], zero from D on
  };
  int64_t packed_size() const { return static_cast<int64_t>(Du) * Ep + Dp; }  // 4-byte units
  Packed packed_at(char* p, int64_t index) const {
    auto* kv = reinterpret_cast<uint32_t*>(p) + index * packed_size();
    return {kv, reinterpret_cast<float*>(kv + static_cast<int64_t>(Du) * Ep)};
  }
  void pack_mean(const float* k_sum, float* m) const {
    for (int j = 0; j < Dp; j += W)
      store(m + j, j < D ? load_n(k_sum + j, lesser(W, D - j)) * set1(a.inv_count) : zero());
  }
  void pack_state(const float* kv, int64_t ld, const float* k_sum, const Packed& packed) const {
    floats_to_tall<M>(kv, ld, D, E, a.scale, packed.kv, Ep);
    pack_mean(k_sum, packed.m);
  }

  // ---- apply

  struct ApplyScratch {
    uint32_t* q;    // row format [kChunk][Dp / U]
    float* z;       // [kChunk]
    float* scores;  // [kChunk][Mp], only for few keys
    uint32_t* scores_rows;
  };
  int Mp() const { return static_cast<int>(round_up<int64_t>(a.M, kColPad)); }
  int64_t apply_scratch_bytes(bool few_keys) const {
    return 4 * static_cast<int64_t>(kChunk) * (Dp / U + 1 + (few_keys ? Mp() * 2 : 0));
  }
  ApplyScratch apply_scratch(char* p, bool few_keys) const {
    auto* q = reinterpret_cast<uint32_t*>(p);
    auto* z = reinterpret_cast<float*>(q + kChunk * (Dp / U));
    if (!few_keys) return {q, z, nullptr, nullptr};
    return {q, z, z + kChunk, reinterpret_cast<uint32_t*>(z + kChunk + kChunk * Mp())};
  }

  // phi(q) of a chunk to row format, and factor[i] = numerator / (phi(q_i) . m + eps).
  void pack_queries(int64_t b, int64_t h, int64_t n0, int n, const float* m, float numerator,
                    const ApplyScratch& s) const {
    with_map(a.feature_map, [&](auto map) {
      constexpr int MAP = decltype(map)::value;
      bool own = a.normalize && !a.q_denom.data;
      pack_rows<M, T, MAP>(at(a.q, b, h, n0), a.q.stride_n, n, D, s.q, Dp / U, own ? m : nullptr, s.z, nullptr);
      if (a.normalize && !own) dot_rows<T, MAP>(at(a.q_denom, b, h, n0), a.q_denom.stride_n, n, D, m, s.z);
    });
    for (int i = 0; i < n; ++i) s.z[i] = a.normalize ? numerator / (s.z[i] + a.eps) : numerator;
  }

  bool can_stream() const {
    constexpr int64_t line = 64;
    int64_t size = sizeof(T);
    return E % W == 0 && E * size % line == 0 && a.out.stride_n * size % line == 0 &&
           a.out.stride_h * size % line == 0 && a.out.stride_b * size % line == 0 &&
           reinterpret_cast<uintptr_t>(a.out.data) % line == 0 && heads * a.N * E * size >= kStreamBytes;
  }

  template <class PackedOf>
  void apply_queries(int64_t b, int64_t h0, int64_t h1, int64_t n0, int64_t n1, const ApplyScratch& s, bool streamed,
                     const PackedOf& packed_of) const {
    for (int64_t i = n0; i < n1; i += kChunk) {
      int n = static_cast<int>(lesser<int64_t>(kChunk, n1 - i));
      Prefetch pf[kPrefetches];
      aim(pf[0], a.q, b, h0, h1, i + kChunk, n1, D);
      if (!streamed) aim(pf[1], a.out, b, h0, h1, i + kChunk, n1, E);  // or every store waits for its line
      for (int64_t h = h0; h < h1; ++h) {
        Packed packed = packed_of(h);
        pack_queries(b, h, i, n, packed.m, 1.0f, s);
        gemm<M, false>(n, Ev, Du, s.q, Dp / U, packed.kv, Ep,
                       WriteRows<T>{at(a.out, b, h, i), a.out.stride_n, s.z, n, E, streamed}, pf);
      }
    }
    if (streamed) stream_fence();
  }

  // ---- few keys: out = (phi(q) phi(k)^T) v * scale / z

  // Fewer operations than N D E + M D E, and keys that stay in the cache.
  bool few_keys() const { return a.M <= 256 && a.N * a.M * (D + E) < (a.N + a.M) * D * E; }

  struct Keys {
    uint32_t* kt;  // tall of phi(k)^T: [Du][Mp]
    uint32_t* v;   // tall [M units][Ep]
    float* m;
  };
  int64_t keys_size() const { return static_cast<int64_t>(Du) * Mp() + divide_up<int64_t>(a.M, U) * Ep + Dp; }
  Keys keys_at(char* p, int64_t index) const {
    auto* kt = reinterpret_cast<uint32_t*>(p) + index * keys_size();
    auto* v = kt + static_cast<int64_t>(Du) * Mp();
    return {kt, v, reinterpret_cast<float*>(v + divide_up<int64_t>(a.M, U) * Ep)};
  }
  void pack_keys(int64_t b, int64_t h, const ApplyScratch& s, const Keys& keys) const {
    int ld = Mp();
    memset(keys.kt, 0, sizeof(uint32_t) * static_cast<size_t>(Du) * static_cast<size_t>(ld));
    memset(keys.m, 0, sizeof(float) * static_cast<size_t>(Dp));
    with_map(a.feature_map, [&](auto map) {
      constexpr int MAP = decltype(map)::value;
      for (int64_t j = 0; j < a.M; j += kChunk) {
        int n = static_cast<int>(lesser<int64_t>(kChunk, a.M - j));
        pack_rows<M, T, MAP>(at(a.k, b, h, j), a.k.stride_n, n, D, s.q, Dp / U, nullptr, nullptr,
                             a.k_denom.data ? nullptr : keys.m);
        if (a.k_denom.data) add_rows<T, MAP>(at(a.k_denom, b, h, j), a.k_denom.stride_n, n, D, keys.m);
        transpose_units(s.q, Dp / U, n, Du, keys.kt + j, ld);
      }
    });
    pack_tall<M, T, kIdentity, false>(at(a.v, b, h, 0), a.v.stride_n, static_cast<int>(a.M), E, keys.v, Ep, nullptr);
    pack_mean(keys.m, keys.m);
  }
  void apply_few_keys(int64_t b, int64_t h, int64_t n0, int64_t n1, const ApplyScratch& s, const Keys& keys) const {
    int ld = Mp(), count = static_cast<int>(a.M);
    for (int64_t i = n0; i < n1; i += kChunk) {
      int n = static_cast<int>(lesser<int64_t>(kChunk, n1 - i));
      pack_queries(b, h, i, n, keys.m, a.scale, s);
      gemm<M, false>(n, divide_up(count, W), Du, s.q, Dp / U, keys.kt, ld, StoreTo{s.scores, ld});
      const uint32_t* scores = reinterpret_cast<const uint32_t*>(s.scores);
      if constexpr (U == 2) {
        floats_to_rows<M>(s.scores, ld, n, count, 1.0f, s.scores_rows, ld / U);
        scores = s.scores_rows;
      }
      gemm<M, false>(n, Ev, divide_up(count, U), scores, ld / U, keys.v, Ep,
                     WriteRows<T>{at(a.out, b, h, i), a.out.stride_n, s.z, n, E, false});
    }
  }

  // ---- the five entry points

  bool forward_few_keys() const {
    bool fused = one_task_per_head(a.N, 1);
    int64_t runs = divide_up(a.N, kRun);
    int slots = slots_for(heads * (fused ? 1 : runs));
    Scratch scratch;
    int64_t per_slot = round_up<int64_t>(apply_scratch_bytes(true), 64);
    int64_t work = scratch.reserve(per_slot * slots);
    int64_t keys = scratch.reserve(4 * keys_size() * (fused ? slots : heads));
    if (!scratch.make()) return false;
    auto work_of = [&](int slot) { return apply_scratch(scratch.at<char>(work + slot * per_slot), true); };
    if (fused) {
      for_each_head([&](int slot, int64_t b, int64_t h) {
        Keys mine = keys_at(scratch.at<char>(keys), slot);
        pack_keys(b, h, work_of(slot), mine);
        apply_few_keys(b, h, 0, a.N, work_of(slot), mine);
      });
    } else {
      for_each_head([&](int slot, int64_t b, int64_t h) {
        pack_keys(b, h, work_of(slot), keys_at(scratch.at<char>(keys), b * a.H + h));
      });
      for_each_part(1, runs, [&](int slot, int64_t b, int64_t h, int64_t, int64_t first, int64_t last) {
        apply_few_keys(b, h, first * kRun, lesser(a.N, last * kRun), work_of(slot),
                       keys_at(scratch.at<char>(keys), b * a.H + h));
      });
    }
    scratch.drop();
    return true;
  }

  // forward (with queries) and state (without).
  bool run_forward(bool with_queries) const {
    if (heads == 0) return true;
    if (with_queries && !a.kv) {
      if (a.N == 0) return true;
      if (few_keys()) return forward_few_keys();
    }
    int64_t N = with_queries ? a.N : 0;
    int64_t length = segment_length(a.M), segments = greater<int64_t>(1, divide_up(a.M, length));
    int64_t runs = divide_up(N, kRun);
    bool fused = one_task_per_head(greater(N, a.M), segments);
    int64_t kv_group = group_of(a.k, 4 * state_size, segments), q_group = group_of(a.q, 4 * packed_size(), runs);
    int slots = slots_for(fused ? heads : heads * greater(segments, runs));
    bool streamed = with_queries && can_stream();

    Scratch scratch;
    int64_t per_slot = round_up<int64_t>(greater(state_scratch_bytes(), apply_scratch_bytes(false)), 64);
    int64_t work = scratch.reserve(per_slot * slots);
    int64_t states = scratch.reserve(4 * state_size * segments * (fused ? slots : heads));
    int64_t packs = scratch.reserve(with_queries ? 4 * packed_size() * (fused ? slots : heads) : 0);
    if (!scratch.make()) return false;

    auto work_of = [&](int slot) { return scratch.at<char>(work + slot * per_slot); };
    // The partial states of one head lie side by side; a fused task reuses its slot's.
    auto state_of = [&](int slot, int64_t b, int64_t h) {
      return scratch.at<float>(states) + (fused ? slot : b * a.H + h) * segments * state_size;
    };
    auto packed_of = [&](int slot, int64_t b, int64_t h) {
      return packed_at(scratch.at<char>(packs), fused ? slot : b * a.H + h);
    };
    auto keys = [&](int slot, int64_t b, int64_t h0, int64_t h1, int64_t first, int64_t last) {
      for (int64_t segment = first; segment < last; ++segment)
        add_keys(b, h0, h1, segment * length, lesser(a.M, (segment + 1) * length), lesser(a.M, last * length),
                 state_scratch(work_of(slot)), [&](int64_t h) { return state_of(slot, b, h) + segment * state_size; });
    };
    auto finish = [&](int slot, int64_t b, int64_t h) {
      float* state = state_of(slot, b, h);
      reduce(state, segments);
      if (a.kv) write_state(state, b, h, a.kv, a.k_sum, 1.0f, 1.0f);
      if (with_queries) pack_state(state, Ep, state + static_cast<int64_t>(Dp) * Ep, packed_of(slot, b, h));
    };
    auto queries = [&](int slot, int64_t b, int64_t h0, int64_t h1, int64_t n0, int64_t n1) {
      apply_queries(b, h0, h1, n0, n1, apply_scratch(work_of(slot), false), streamed,
                    [&](int64_t h) { return packed_of(slot, b, h); });
    };
    if (fused) {
      for_each_head([&](int slot, int64_t b, int64_t h) {
        keys(slot, b, h, h + 1, 0, 1);
        finish(slot, b, h);
        queries(slot, b, h, h + 1, 0, N);
      });
    } else {
      for_each_part(kv_group, segments, keys);
      for_each_head(finish);
      for_each_part(q_group, runs, [&](int slot, int64_t b, int64_t h0, int64_t h1, int64_t first, int64_t last) {
        queries(slot, b, h0, h1, first * kRun, lesser(N, last * kRun));
      });
    }
    scratch.drop();
    return true;
  }

  bool run_apply() const {
    if (heads == 0 || a.N == 0) return true;
    bool fused = one_task_per_head(a.N, 1);
    int64_t runs = divide_up(a.N, kRun);
    int64_t group = group_of(a.q, 4 * packed_size(), runs);
    int slots = slots_for(fused ? heads : heads * runs);
    bool streamed = can_stream();
    Scratch scratch;
    int64_t per_slot = round_up<int64_t>(apply_scratch_bytes(false), 64);
    int64_t work = scratch.reserve(per_slot * slots);
    int64_t packs = scratch.reserve(4 * packed_size() * (fused ? slots : heads));
    if (!scratch.make()) return false;
    auto packed_of = [&](int slot, int64_t b, int64_t h) {
      return packed_at(scratch.at<char>(packs), fused ? slot : b * a.H + h);
    };
    auto pack = [&](int slot, int64_t b, int64_t h) {
      int64_t head = b * a.H + h;
      pack_state(a.kv + head * D * E, E, a.k_sum + head * D, packed_of(slot, b, h));
    };
    auto queries = [&](int slot, int64_t b, int64_t h0, int64_t h1, int64_t n0, int64_t n1) {
      apply_queries(b, h0, h1, n0, n1, apply_scratch(scratch.at<char>(work + slot * per_slot), false), streamed,
                    [&](int64_t h) { return packed_of(slot, b, h); });
    };
    if (fused) {
      for_each_head([&](int slot, int64_t b, int64_t h) {
        pack(slot, b, h);
        queries(slot, b, h, h + 1, 0, a.N);
      });
    } else {
      for_each_head(pack);
      for_each_part(group, runs, [&](int slot, int64_t b, int64_t h0, int64_t h1, int64_t first, int64_t last) {
        queries(slot, b, h0, h1, first * kRun, lesser(a.N, last * kRun));
      });
    }
    scratch.drop();
    return true;
  }

  // ---- backward of apply

  struct BackwardScratch {
    float *f, *fd;              // phi(q or k), phi(q_denom) [kChunk][Dp]
    float* w;                   // [kChunk][Dp]
    uint32_t* f_operand;        // f in the format of the products (float32: f itself)
    uint32_t *g_rows, *g_tall;  // grad_out, or v, in both formats (float32: one)
    float *z, *sum;             // [kChunk], [Dp]
    uint32_t* wide;             // row format of a whole state, while it is transposed
  };
  int64_t backward_scratch_bytes() const {
    int64_t rows = greater<int64_t>(D, kChunk);
    return 4 * (kChunk * (4 * static_cast<int64_t>(Dp) + 2 * Ep + 1) + Dp + rows * Ep);
  }
  BackwardScratch backward_scratch(char* p) const {
    BackwardScratch s;
    const int64_t d = static_cast<int64_t>(kChunk) * Dp, e = static_cast<int64_t>(kChunk) * Ep;
    s.f = reinterpret_cast<float*>(p);
    s.fd = s.f + d;
    s.w = s.fd + d;
    s.f_operand = reinterpret_cast<uint32_t*>(s.w + d);
    s.g_rows = s.f_operand + d;
    s.g_tall = s.g_rows + e;
    s.z = reinterpret_cast<float*>(s.g_tall + e);
    s.sum = s.z + kChunk;
    s.wide = reinterpret_cast<uint32_t*>(s.sum + Dp);
    return s;
  }

  // The packed scale * kv^T [Eu][Dp] and the mean key.
  int64_t transposed_size() const { return static_cast<int64_t>(Eu) * Dp + Dp; }
  Packed transposed_at(char* p, int64_t index) const {
    auto* kv = reinterpret_cast<uint32_t*>(p) + index * transposed_size();
    return {kv, reinterpret_cast<float*>(kv + static_cast<int64_t>(Eu) * Dp)};
  }

  void apply_backward_chunk(int64_t b, int64_t h, int64_t n0, int n, const BackwardScratch& s, const Packed& packed,
                            float* state, Prefetch* pf) const {
    const bool own = !a.q_denom.data;
    float *grad_kv = state, *grad_sum = state + static_cast<int64_t>(Dp) * Ep;
    const T* g = at(a.grad_out, b, h, n0);
    pack_rows<M, T, kIdentity>(g, a.grad_out.stride_n, n, E, s.g_rows, Ep / U, nullptr, nullptr, nullptr);
    const uint32_t* g_tall = s.g_rows;
    if constexpr (U == 2) {
      pack_tall<M, T, kIdentity, false>(g, a.grad_out.stride_n, n, E, s.g_tall, Ep, nullptr);
      g_tall = s.g_tall;
    }
    gemm<M, false>(n, Dv, Eu, s.g_rows, Ep / U, packed.kv, Dp, StoreTo{s.w, Dp}, pf);  // w = scale * grad_out kv^T
    with_map(a.feature_map, [&](auto map) {
      constexpr int MAP = decltype(map)::value;
      features<T, MAP>(at(a.q, b, h, n0), a.q.stride_n, n, D, s.f, Dp);
      if (!own) features<T, MAP>(at(a.q_denom, b, h, n0), a.q_denom.stride_n, n, D, s.fd, Dp);
      const float* fz = own ? s.f : s.fd;
      memset(s.sum, 0, sizeof(float) * static_cast<size_t>(Dp));
      for (int i = 0; i < n; ++i) {
        float *f = s.f + i * Dp, *w = s.w + i * Dp;
        const float* fd = fz + i * Dp;
        V vz = zero(), vdot = zero();
        for (int j = 0; j < D; j += W) {
          vz = fma(load(fd + j), load(packed.m + j), vz);
          vdot = fma(load(f + j), load(w + j), vdot);
        }
        float r = a.normalize ? 1.0f / (hsum(vz) + a.eps) : 1.0f;
        float dz = a.normalize ? -hsum(vdot) * r * r : 0.0f;
        T* grad_q = at(a.grad_q, b, h, n0 + i);
        for (int j = 0; j < D; j += W) {
          int width = lesser(W, D - j);
          V phi_q = load(f + j), grad = load(w + j) * set1(r), grad_d = load(packed.m + j) * set1(dz);
          if (own) {
            grad = grad + grad_d;
          } else {
            V phi_d = load(fd + j);
            store_n(at(a.grad_q_denom, b, h, n0 + i) + j, grad_d * phi_grad<MAP>(phi_d), width);
          }
          if (a.normalize) store(s.sum + j, fma(load(fd + j), set1(dz), load(s.sum + j)));
          store_n(grad_q + j, grad * phi_grad<MAP>(phi_q), width);
          store(f + j, phi_q * set1(r));
        }
      }
    });
    for (int j = 0; j < Dp; j += W) store(grad_sum + j, load(grad_sum + j) + load(s.sum + j));
    const uint32_t* f_tall = reinterpret_cast<const uint32_t*>(s.f);
    if constexpr (U == 2) {
      floats_to_tall<M>(s.f, Dp, n, D, 1.0f, s.f_operand, Dp);
      f_tall = s.f_operand;
    }
    gemm<M, true>(D, Ev, divide_up(n, U), f_tall, Dp, g_tall, Ep, AddTo{grad_kv, Ep}, pf);
  }

  bool run_apply_backward() const {
    if (heads == 0) return true;
    int64_t length = segment_length(a.N), segments = greater<int64_t>(1, divide_up(a.N, length));
    bool fused = one_task_per_head(a.N, segments);
    int64_t group = group_of(a.q, 4 * (state_size + transposed_size()), segments);
    int slots = slots_for(fused ? heads : heads * segments);
    Scratch scratch;
    int64_t per_slot = round_up<int64_t>(backward_scratch_bytes(), 64);
    int64_t work = scratch.reserve(per_slot * slots);
    int64_t states = scratch.reserve(4 * state_size * segments * (fused ? slots : heads));
    int64_t packs = scratch.reserve(4 * transposed_size() * (fused ? slots : heads));
    if (!scratch.make()) return false;
    auto work_of = [&](int slot) { return backward_scratch(scratch.at<char>(work + slot * per_slot)); };
    auto home = [&](int slot, int64_t b, int64_t h) { return fused ? slot : b * a.H + h; };
    auto state_of = [&](int slot, int64_t b, int64_t h) {
      return scratch.at<float>(states) + home(slot, b, h) * segments * state_size;
    };
    auto packed_of = [&](int slot, int64_t b, int64_t h) {
      return transposed_at(scratch.at<char>(packs), home(slot, b, h));
    };
    auto pack = [&](int slot, int64_t b, int64_t h) {
      int64_t head = b * a.H + h;
      Packed packed = packed_of(slot, b, h);
      floats_to_tall_transposed<M>(a.kv + head * D * E, E, D, E, a.scale, work_of(slot).wide, Ep / U, packed.kv, Dp);
      pack_mean(a.k_sum + head * D, packed.m);
    };
    auto queries = [&](int slot, int64_t b, int64_t h0, int64_t h1, int64_t first, int64_t last) {
      int64_t next = lesser(a.N, last * length);
      for (int64_t segment = first; segment < last; ++segment) {
        auto state = [&](int64_t h) { return state_of(slot, b, h) + segment * state_size; };
        for (int64_t h = h0; h < h1; ++h) memset(state(h), 0, sizeof(float) * static_cast<size_t>(state_size));
        int64_t end = lesser(a.N, (segment + 1) * length);
        for (int64_t i = segment * length; i < end; i += kChunk) {
          Prefetch pf[kPrefetches];
          aim(pf[0], a.q, b, h0, h1, i + kChunk, next, D);
          aim(pf[1], a.grad_out, b, h0, h1, i + kChunk, next, E);
          aim(pf[2], a.grad_q, b, h0, h1, i + kChunk, next, D);
          for (int64_t h = h0; h < h1; ++h)
            apply_backward_chunk(b, h, i, static_cast<int>(lesser<int64_t>(kChunk, end - i)), work_of(slot),
                                 packed_of(slot, b, h), state(h), pf);
        }
      }
    };
    auto finish = [&](int slot, int64_t b, int64_t h) {
      float* state = state_of(slot, b, h);
      reduce(state, segments);
      write_state(state, b, h, a.grad_kv, a.grad_k_sum, a.scale, a.inv_count);
    };
    if (fused) {
      for_each_head([&](int slot, int64_t b, int64_t h) {
        pack(slot, b, h);
        queries(slot, b, h, h + 1, 0, 1);
        finish(slot, b, h);
      });
    } else {
      for_each_head(pack);
      for_each_part(group, segments, queries);
      for_each_head(finish);
    }
    scratch.drop();
    return true;
  }

  // ---- backward of state

  void state_backward_chunk(int64_t b, int64_t h, int64_t m0, int n, const BackwardScratch& s, const uint32_t* grad_kv,
                            const uint32_t* grad_kv_t, const float* grad_sum, Prefetch* pf) const {
    const bool own = !a.k_denom.data;
    with_map(a.feature_map,
             [&](auto map) { features<T, decltype(map)::value>(at(a.k, b, h, m0), a.k.stride_n, n, D, s.f, Dp); });
    const uint32_t* f_rows = reinterpret_cast<const uint32_t*>(s.f);
    if constexpr (U == 2) {
      floats_to_rows<M>(s.f, Dp, n, D, 1.0f, s.f_operand, Dp / U);
      f_rows = s.f_operand;
    }
    gemm<M, false>(n, Ev, Du, f_rows, Dp / U, grad_kv, Ep,
                   WriteRows<T>{at(a.grad_v, b, h, m0), a.grad_v.stride_n, s.z, n, E, false}, pf);
    pack_rows<M, T, kIdentity>(at(a.v, b, h, m0), a.v.stride_n, n, E, s.g_rows, Ep / U, nullptr, nullptr, nullptr);
    gemm<M, false>(n, Dv, Eu, s.g_rows, Ep / U, grad_kv_t, Dp, StoreTo{s.w, Dp}, pf);
    with_map(a.feature_map, [&](auto map) {
      constexpr int MAP = decltype(map)::value;
      for (int i = 0; i < n; ++i) {
        T* grad_k = at(a.grad_k, b, h, m0 + i);
        for (int j = 0; j < D; j += W) {
          V grad = load(s.w + i * Dp + j);
          if (own) grad = grad + load(grad_sum + j);
          store_n(grad_k + j, grad * phi_grad<MAP>(load(s.f + i * Dp + j)), lesser(W, D - j));
        }
      }
      if (!own) {
        features<T, MAP>(at(a.k_denom, b, h, m0), a.k_denom.stride_n, n, D, s.fd, Dp);
        for (int i = 0; i < n; ++i)
          for (int j = 0; j < D; j += W)
            store_n(at(a.grad_k_denom, b, h, m0 + i) + j, load(grad_sum + j) * phi_grad<MAP>(load(s.fd + i * Dp + j)),
                    lesser(W, D - j));
      }
    });
  }

  bool run_state_backward() const {
    if (heads == 0) return true;
    bool fused = one_task_per_head(a.M, 1);
    int64_t runs = divide_up(a.M, kRun);
    const int64_t plain = static_cast<int64_t>(Du) * Ep, transposed = static_cast<int64_t>(Eu) * Dp;
    const int64_t size = plain + transposed + Dp;
    int64_t group = group_of(a.k, 4 * size, runs);
    int slots = slots_for(fused ? heads : heads * runs);
    Scratch scratch;
    int64_t per_slot = round_up<int64_t>(backward_scratch_bytes(), 64);
    int64_t work = scratch.reserve(per_slot * slots);
    int64_t packs = scratch.reserve(4 * size * (fused ? slots : heads));
    if (!scratch.make()) return false;
    auto work_of = [&](int slot) { return backward_scratch(scratch.at<char>(work + slot * per_slot)); };
    auto packed_of = [&](int slot, int64_t b, int64_t h) {
      return scratch.at<uint32_t>(packs) + (fused ? slot : b * a.H + h) * size;
    };
    auto pack = [&](int slot, int64_t b, int64_t h) {
      int64_t head = b * a.H + h;
      const float* grad_kv = a.grad_kv + head * D * E;
      uint32_t* p = packed_of(slot, b, h);
      floats_to_tall<M>(grad_kv, E, D, E, 1.0f, p, Ep);
      floats_to_tall_transposed<M>(grad_kv, E, D, E, 1.0f, work_of(slot).wide, Ep / U, p + plain, Dp);
      auto* sum = reinterpret_cast<float*>(p + plain + transposed);
      for (int j = 0; j < D; j += W) store(sum + j, load_n(a.grad_k_sum + head * D + j, lesser(W, D - j)));
    };
    auto keys = [&](int slot, int64_t b, int64_t h0, int64_t h1, int64_t m0, int64_t m1) {
      BackwardScratch s = work_of(slot);
      for (int i = 0; i < kChunk; ++i) s.z[i] = 1.0f;  // grad_v is not divided by anything
      for (int64_t m = m0; m < m1; m += kChunk) {
        Prefetch pf[kPrefetches];
        aim(pf[0], a.k, b, h0, h1, m + kChunk, m1, D);
        aim(pf[1], a.v, b, h0, h1, m + kChunk, m1, E);
        aim(pf[2], a.grad_k, b, h0, h1, m + kChunk, m1, D);
        aim(pf[3], a.grad_v, b, h0, h1, m + kChunk, m1, E);
        for (int64_t h = h0; h < h1; ++h) {
          const uint32_t* p = packed_of(slot, b, h);
          state_backward_chunk(b, h, m, static_cast<int>(lesser<int64_t>(kChunk, m1 - m)), s, p, p + plain,
                               reinterpret_cast<const float*>(p + plain + transposed), pf);
        }
      }
    };
    if (fused) {
      for_each_head([&](int slot, int64_t b, int64_t h) {
        pack(slot, b, h);
        keys(slot, b, h, h + 1, 0, a.M);
      });
    } else {
      for_each_head(pack);
      for_each_part(group, runs, [&](int slot, int64_t b, int64_t h0, int64_t h1, int64_t first, int64_t last) {
        keys(slot, b, h0, h1, first * kRun, lesser(a.M, last * kRun));
      });
    }
    scratch.drop();
    return true;
  }
};

template <class F>
bool with_type(const LinearAttentionArgs& a, const Parallel& p, const F& f) {
  if (a.dtype == DType::kFloat32) return f(Op<float>(a, p));
  if (a.dtype == DType::kFloat16) return f(Op<f16>(a, p));
  return f(Op<bf16>(a, p));
}

bool forward(const LinearAttentionArgs& a, const Parallel& p) {
  return with_type(a, p, [](const auto& op) { return op.run_forward(true); });
}
bool state(const LinearAttentionArgs& a, const Parallel& p) {
  return with_type(a, p, [](const auto& op) { return op.run_forward(false); });
}
bool apply(const LinearAttentionArgs& a, const Parallel& p) {
  return with_type(a, p, [](const auto& op) { return op.run_apply(); });
}
bool apply_backward(const LinearAttentionArgs& a, const Parallel& p) {
  return with_type(a, p, [](const auto& op) { return op.run_apply_backward(); });
}
bool state_backward(const LinearAttentionArgs& a, const Parallel& p) {
  return with_type(a, p, [](const auto& op) { return op.run_state_backward(); });
}

}  // namespace

const LinearAttentionKernels linear_attention = {forward, state, apply, apply_backward, state_backward};

}  // namespace LINATTN_ISA
}  // namespace linattn
