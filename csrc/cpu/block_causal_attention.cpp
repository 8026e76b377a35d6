// Block-causal attention, forward and backward (meaning: block_causal_attention.h; formulas: docs).
//
// Softmax with one side in the lanes of registers and the other in rows, as in window_attention.cpp, and simpler: all
// tokens of a block see the same blocks, so no pair is ever masked. A tile is a run of up to 64 tokens of one block, in
// the block's own order; rows come by chunks of 64 tokens of a block that the tile meets, gathered from raster order.
//
//   forward, grad_q    lanes are queries, rows the keys of the one, two or four blocks that they see
//   grad_k, grad_v     lanes are keys, rows the queries of the blocks that see them: self, right, below, bottom-right
//
//   S[64, lanes] = K Q^T + A, P = exp(S - max), O^T[D, lanes] = O^T alpha + V^T P
//
// A block that fills several slots is met once: A = log sum over its slots of exp(scale q.e_s), one number per query
// and key block. Where a slot is alone in its block A is scale q.e_s itself.
//
// Bytes: four tiles of a block share a gathered chunk, and what the next chunk needs is fetched while this one is
// multiplied. k is not even copied where its layout is that of an operand. Neighbouring blocks are neighbouring tasks.
// Backward recomputes P from lse: grad_k and grad_v first (4 products), then grad_q (3), which also leaves for every
// query G_s = sum over the keys of slot s of dS, from which grad_slot_embed is summed in a fixed order. No atomics.
#include "block_causal_attention.h"

#include <math.h>

#include "softmax.h"

namespace linattn {
namespace LINATTN_ISA {
namespace {

constexpr int kSlots = 4;
constexpr int kChunk = 64;  // rows per step; a multiple of kRowPad and of every unit
constexpr int kMaxLanes = 64;
constexpr int kMaxGroup = 4;   // tiles that share a gathered chunk
constexpr int kAhead = 3;      // rows of the next chunk that are fetched per register block
constexpr int64_t kRun = 512;  // tokens per task of simple loops

enum Pass { kForward, kGradQ, kGradKV };

// How many blocks up and to the left the block of each slot lies.
constexpr int kUp[kSlots] = {0, 1, 0, 1}, kLeft[kSlots] = {0, 1, 1, 0};

// A block that a tile meets, and the slots that connect them (bits).
struct Met {
  int64_t row = 0, column = 0;
  unsigned slots = 0;
};

// Rows: tokens of one block.
struct Chunk {
  int n = 0, part = 0;  // part: index of that block
  int64_t token[kChunk];
};

// Lanes: tokens of one block.
struct Tile {
  int count = 0;
  int64_t token[kMaxLanes];
  uint32_t *x1, *x2;   // [Du][L]: q | q, grad_out | k, v
  float *acc1, *acc2;  // [Dp][L]: out | grad_q | grad_k, grad_v
  float *m, *l;        // [L]: running maximum and sum; in kGradQ lse and delta
  float *shift, *sum;  // [kSlots][L]: A of each block that is met; in kGradQ the sums of dS over its keys
};

struct Work {                 // one slot's scratch
  uint32_t *rows1, *rows2;    // [kChunk][Dp / U]: k, v | k, v | q, grad_out
  const char** in_place;      // [kChunk]: instead of rows1 the rows of k where they lie
  uint32_t *tall1, *tall2;    // the same paired along rows [kChunk / U][Dp]; for one value per unit the same memory
  float *s, *dp;              // [kChunk][L]
  uint32_t *p, *ds;           // [kChunk / U][L]; for one value per unit over s and dp
  float *max, *alpha, *zero;  // [L]
  float *row_lse, *row_delta, *row_shift;  // [kChunk]
  float* turn;                             // [L][Dp]
  Tile tiles[kMaxGroup];
};

// S = scale * block + shift, with max also the running maximum of each lane.
struct Scores {
  float* S;
  int64_t ld;
  float* max;
  const float* shift;
  float scale;
  int n;
  template <int R, int N>
  LINATTN_INLINE void operator()(V (&acc)[R][N], int r, int column) const {
    V m[N], a[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      m[j] = max ? load(max + column + j * V::W) : zero();
      a[j] = load(shift + column + j * V::W);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      if (r + i >= n) break;
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        V s = fma(acc[i][j], set1(scale), a[j]);
        m[j] = vmax(m[j], s);
        store(S + (r + i) * ld + column + j * V::W, s);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j)
      if (max) store(max + column + j * V::W, m[j]);
  }
};

template <class T>
struct Op {
  using M = typename Multiply<T>::M;
  // Of exp: the shortest one would show in lse, which is float32 for every type.
  static constexpr int U = M::U, W = V::W, kDegree = greater(4, exp_degree<T>);

  const BlockCausalAttentionArgs& a;
  const Parallel& parallel;
  const int D, Dp = round_up(D, kColPad), Du = divide_up(D, U), Dpu = Dp / U;
  const int64_t heads, in_block, q_count, k_count;  // tokens
  const int L, vectors;
  const int64_t tiles;     // per block
  float* slot = nullptr;   // (B, H, queries, kSlots): scale q.e_s, which kGradQ replaces by G_s; null without embedding
  float* delta = nullptr;  // (B, H, queries)

  Op(const BlockCausalAttentionArgs& args, const Parallel& p)
      : a(args),
        parallel(p),
        D(args.D),
        heads(args.B * args.H),
        in_block(args.block * args.block),
        q_count(args.q_rows * args.columns * in_block),
        k_count(args.rows * args.columns * in_block),
        L(in_block <= 32 ? 32 : kMaxLanes),
        vectors(L / W),
        tiles(divide_up<int64_t>(in_block, L)) {}

  // ---- geometry

  // The blocks that query block (i, j) sees.
  int seen(int64_t i, int64_t j, Met* met) const {
    int count = 0;
    for (int s = 0; s < kSlots; ++s) {
      int64_t row = i - kUp[s], column = j - kLeft[s];
      if (!a.clamp && (row < 0 || column < 0)) continue;
      row = greater<int64_t>(0, row), column = greater<int64_t>(0, column);
      int k = 0;
      while (k < count && (met[k].row != row || met[k].column != column)) ++k;
      if (k == count) met[count++] = {row, column, 0};
      met[k].slots |= 1u << s;
    }
    return count;
  }
  // The query blocks that see key block (i, j).
  int seeing(int64_t i, int64_t j, Met* met) const {
    int count = 0;
    for (int64_t row = greater(i, a.q_row); row < lesser(i + 2, a.q_row + a.q_rows); ++row)
      for (int64_t column = j; column < lesser(j + 2, a.columns); ++column) {
        Met theirs[kSlots];
        for (int n = seen(row, column, theirs), k = 0; k < n; ++k)
          if (theirs[k].row == i && theirs[k].column == j) met[count++] = {row, column, theirs[k].slots};
      }
    return count;
  }

  // f(i, token) for the n tokens of a block from its token `first` on. row: of the block, in the tensor.
  template <class F>
  LINATTN_INLINE void for_each_token(int64_t row, int64_t column, int64_t first, int n, const F& f) const {
    int64_t y = first / a.block, x = first % a.block;
    const int64_t width = a.columns * a.block;
    for (int i = 0; i < n; ++i) {
      f(i, (row * a.block + y) * width + column * a.block + x);
      if (++x == a.block) x = 0, ++y;
    }
  }

  // ---- embeddings

  // scale q.e_s of one query.
  void embed(const T* q, int64_t h, float* s) const {
    V sum[kSlots] = {zero(), zero(), zero(), zero()};
    for (int j = 0; j < D; j += W) {
      const int w = lesser(W, D - j);
      V x = load_n(q + j, w);
      LINATTN_EACH(k, kSlots) sum[k] = fma(x, load_n(a.slot_embed + (k * a.H + h) * D + j, w), sum[k]);
    }
    hsum4(sum, s);
    for (int k = 0; k < kSlots; ++k) s[k] *= a.scale;
  }
  float* slots_of(int64_t n) const { return slot ? slot + kSlots * n : nullptr; }
  // log sum over the slots of exp(s).
  float joint(const float* s, unsigned slots) const {
    int count = 0, first = 0;
    for (int k = kSlots - 1; k >= 0; --k)
      if (slots >> k & 1) ++count, first = k;
    if (!a.slot_embed) return count == 1 ? 0.0f : logf(static_cast<float>(count));
    float m = s[first], sum = 0;
    if (count == 1) return m;
    for (int k = 0; k < kSlots; ++k)
      if (slots >> k & 1 && m < s[k]) m = s[k];
    for (int k = 0; k < kSlots; ++k)
      if (slots >> k & 1) sum += expf(s[k] - m);
    return m + logf(sum);
  }

  // ---- rows

  template <int PASS>
  const View& rows1() const {
    return PASS == kGradKV ? a.q : a.k;
  }
  template <int PASS>
  const View& rows2() const {
    return PASS == kGradKV ? a.grad_out : a.v;
  }

  void pack_rows(const View& x, int64_t b, int64_t h, const Chunk& c, uint32_t* A) const {
    const T* p = at<T>(x, b, h, 0);
    for (int i = 0; i < c.n; ++i) pack_row(p + c.token[i] * x.stride_n, D, A + i * Dpu);
  }
  void pack_tall([[maybe_unused]] const View& x, [[maybe_unused]] int64_t b, [[maybe_unused]] int64_t h,
                 [[maybe_unused]] const Chunk& c, [[maybe_unused]] uint32_t* A) const {
#ifdef __AVX512BF16__
    if constexpr (U == 2) {
      const T* p = at<T>(x, b, h, 0);
      for (int i = 0; i < c.n; i += 2, A += Dp)
        pack_pair(p + c.token[i] * x.stride_n, i + 1 < c.n ? p + c.token[i + 1] * x.stride_n : nullptr, D, A);
    }
#endif
  }

  // k is read once per tile by forward, so it need not be copied where its values are units as they lie.
  bool in_place() const { return static_cast<int>(sizeof(T)) * U == 4 && D % U == 0; }

  template <int PASS>
  void gather(const Chunk& c, const Met* met, int64_t b, int64_t h, const Work& w) const {
    const View &x1 = rows1<PASS>(), &x2 = rows2<PASS>();
    if (PASS == kForward && in_place()) {
      const T* p = at<T>(x1, b, h, 0);
      for (int i = 0; i < round_up(c.n, kRowPad); ++i)
        w.in_place[i] = reinterpret_cast<const char*>(p + c.token[i < c.n ? i : 0] * x1.stride_n);
    } else {
      pack_rows(x1, b, h, c, w.rows1);
    }
    if (PASS != kForward || U == 1) pack_rows(x2, b, h, c, w.rows2);
    if (U == 2 && PASS != kForward) pack_tall(x1, b, h, c, w.tall1);
    if (U == 2 && PASS != kGradQ) pack_tall(x2, b, h, c, w.tall2);
    if (PASS == kGradKV)
      for (int i = 0; i < c.n; ++i) {
        const int64_t n = (b * a.H + h) * q_count + c.token[i];
        w.row_lse[i] = a.lse[n], w.row_delta[i] = delta[n];
        w.row_shift[i] = joint(slots_of(n), met[c.part].slots);
      }
  }

  // f(chunk, next) for the tokens of the blocks that are met, block by block; next is null at the end.
  template <int PASS, class F>
  void chunks(const Met* met, int count, const F& f) const {
    Chunk both[2];
    int part = 0;
    int64_t first = 0;
    auto make = [&](Chunk& c) {
      c.n = 0;
      if (part == count) return;
      c.part = part, c.n = static_cast<int>(lesser<int64_t>(kChunk, in_block - first));
      const int64_t row = met[part].row - (PASS == kGradKV ? a.q_row : 0);
      for_each_token(row, met[part].column, first, c.n, [&](int i, int64_t token) { c.token[i] = token; });
      first += c.n;
      if (first == in_block) first = 0, ++part;
    };
    Chunk *now = &both[0], *next = &both[1];
    make(*now);
    while (now->n) {
      make(*next);
      f(*now, next->n ? next : nullptr);
      Chunk* done = now;
      now = next, next = done;
    }
  }

  // ---- one tile and one chunk

  // P = exp(S - max) and what follows from a new maximum. Rows are written up to the next multiple of four, as zeros.
  void softmax(const Tile& t, int n, const Work& w) const {
    for (int column = 0; column < L; column += W) {
      V m = load(w.max + column), sum = zero();
      V alpha[1] = {load(t.m + column) - m};
      exp_neg<kDegree>(alpha);
      for (int i = 0; i < n; i += 4) {
        V x[4];
        LINATTN_EACH(r, 4) x[r] = i + r < n ? load(w.s + (i + r) * L + column) - m : set1(-kInfinity);
        exp_neg<kDegree>(x);
        sum = sum + ((x[0] + x[1]) + (x[2] + x[3]));
        store_weights<U>(w.p, L, i, column, x);
      }
      store(t.l + column, fma(load(t.l + column), alpha[0], sum));
      store(t.m + column, m);
      store(w.alpha + column, alpha[0]);
    }
  }

  // P = exp(S - lse) and dS = P (dP - delta).
  template <int PASS>
  void differentiate(const Tile& t, const Chunk& c, const Work& w) const {
    for (int column = 0; column < L; column += W) {
      V sum = zero();
      for (int i = 0; i < c.n; i += 4) {
        V x[4], g[4];
        LINATTN_EACH(r, 4) {
          const int row = lesser(i + r, c.n - 1);
          V s = load(w.s + row * L + column);
          s = PASS == kGradQ ? s - load(t.m + column) : (s + set1(w.row_shift[row])) - set1(w.row_lse[row]);
          x[r] = i + r < c.n ? s : set1(-kInfinity);
        }
        exp_neg<kDegree>(x);
        LINATTN_EACH(r, 4) {
          const int row = lesser(i + r, c.n - 1);
          V d = PASS == kGradQ ? load(t.l + column) : set1(w.row_delta[row]);
          g[r] = i + r < c.n ? x[r] * (load(w.dp + row * L + column) - d) : zero();
        }
        sum = sum + ((g[0] + g[1]) + (g[2] + g[3]));
        if (PASS == kGradKV) store_weights<U>(w.p, L, i, column, x);
        store_weights<U>(w.ds, L, i, column, g);
      }
      if (PASS == kGradQ) store(t.sum + c.part * L + column, load(t.sum + c.part * L + column) + sum);
    }
  }

  // acc (+)= A^T P over the rows of a chunk.
  template <class Epilogue>
  void accumulate(const Chunk& c, const uint32_t* A, const uint32_t* P, const Epilogue& epilogue, Ahead& ahead) const {
    gemm<M, true>(D, vectors, divide_up(c.n, U), A, Dp, P, L, Fetching<Epilogue>{epilogue, ahead, kAhead});
  }

  template <int PASS>
  void step(const Tile& t, const Chunk& c, const Chunk* next, int64_t b, int64_t h, const Work& w) const {
    const View &x1 = rows1<PASS>(), &x2 = rows2<PASS>();
    constexpr int64_t size = sizeof(T);
    Ahead ahead{next ? next->token : nullptr,
                next ? next->n : 0,
                reinterpret_cast<const char*>(at<T>(x1, b, h, 0)),
                reinterpret_cast<const char*>(at<T>(x2, b, h, 0)),
                x1.stride_n * size,
                x2.stride_n * size,
                static_cast<int>(D * size)};
    const float* shift = PASS == kGradKV ? w.zero : t.shift + c.part * L;
    const Scores scores{w.s, L, PASS == kForward ? w.max : nullptr, shift, a.scale, c.n};
    if (PASS == kForward)
      for (int i = 0; i < L; i += W) store(w.max + i, load(t.m + i));
    const Fetching<Scores> epilogue{scores, ahead, kAhead};
    if (PASS == kForward && in_place())
      gemm_rows<M>(c.n, vectors, Du, w.in_place, t.x1, L, epilogue);
    else
      gemm<M, false>(c.n, vectors, Du, w.rows1, Dpu, t.x1, L, epilogue);
    if constexpr (PASS == kForward) {
      softmax(t, c.n, w);
      accumulate(c, w.tall2, w.p, Rescale{t.acc1, L, w.alpha}, ahead);
    } else {
      gemm<M, false>(c.n, vectors, Du, w.rows2, Dpu, t.x2, L, StoreTo{w.dp, L});
      differentiate<PASS>(t, c, w);
      accumulate(c, w.tall1, w.ds, AddTo{t.acc1, L}, ahead);
      if (PASS == kGradKV) accumulate(c, w.tall2, w.p, AddTo{t.acc2, L}, ahead);
    }
  }

  // ---- tiles

  void pack_lanes(const View& x, int64_t b, int64_t h, const Tile& t, uint32_t* dst, const Work& w) const {
    auto* rows = reinterpret_cast<uint32_t*>(w.turn);
    if (t.count < L) memset(rows, 0, sizeof(uint32_t) * static_cast<size_t>(L) * static_cast<size_t>(Dpu));
    for (int i = 0; i < t.count; ++i) pack_row(at<T>(x, b, h, t.token[i]), D, rows + i * Dpu);
    transpose_units(rows, Dpu, L, Du, dst, L);
  }
  // w.turn = acc as rows of tokens.
  void turn_back(const float* acc, const Work& w) const {
    transpose_units(reinterpret_cast<const uint32_t*>(acc), L, D, L, reinterpret_cast<uint32_t*>(w.turn), Dp);
  }
  void write_lane(const Work& w, int lane, T* out, float factor) const {
    for (int j = 0; j < D; j += W) store_n(out + j, load(w.turn + lane * Dp + j) * set1(factor), lesser(W, D - j));
  }
  static void fill(float* x, int64_t n, float value) {
    for (int64_t i = 0; i < n; i += W) store(x + i, set1(value));
  }

  template <int PASS>
  void begin(const Tile& t, const Met* met, int count, int64_t b, int64_t h, const Work& w) const {
    pack_lanes(PASS == kGradKV ? a.k : a.q, b, h, t, t.x1, w);
    if (PASS != kForward) pack_lanes(PASS == kGradKV ? a.v : a.grad_out, b, h, t, t.x2, w);
    fill(t.acc1, static_cast<int64_t>(Dp) * L, 0.0f);
    if (PASS == kForward) fill(t.m, L, kLowest), fill(t.l, L, 0.0f);
    if (PASS == kGradQ) fill(t.m, L, 0.0f), fill(t.l, L, 0.0f), fill(t.sum, kSlots * L, 0.0f);
    if (PASS == kGradKV) {
      fill(t.acc2, static_cast<int64_t>(Dp) * L, 0.0f);
      return;
    }
    fill(t.shift, kSlots * L, 0.0f);
    for (int i = 0; i < t.count; ++i) {
      const int64_t n = (b * a.H + h) * q_count + t.token[i];
      float own[kSlots];
      const float* s = own;
      if (PASS == kGradQ)
        s = slots_of(n), t.m[i] = a.lse[n], t.l[i] = delta[n];
      else if (a.slot_embed)
        embed(at<T>(a.q, b, h, t.token[i]), h, own);
      for (int k = 0; k < count; ++k) t.shift[k * L + i] = joint(s, met[k].slots);
    }
  }

  template <int PASS>
  void finish(const Tile& t, const Met* met, int count, int64_t b, int64_t h, const Work& w) const {
    turn_back(t.acc1, w);
    for (int i = 0; i < t.count; ++i) {
      const int64_t n = (b * a.H + h) * q_count + t.token[i];
      if (PASS == kForward) {
        write_lane(w, i, at<T>(a.out, b, h, t.token[i]), 1.0f / t.l[i]);
        a.lse[n] = t.m[i] + logf(t.l[i]);
      } else if (PASS == kGradQ) {
        if (slot) add_embeddings(t, met, count, i, slots_of(n), h, w);
        write_lane(w, i, at<T>(a.grad_q, b, h, t.token[i]), a.scale);
      } else {
        write_lane(w, i, at<T>(a.grad_k, b, h, t.token[i]), a.scale);
      }
    }
    if (PASS == kGradKV) {
      turn_back(t.acc2, w);
      for (int i = 0; i < t.count; ++i) write_lane(w, i, at<T>(a.grad_v, b, h, t.token[i]), 1.0f);
    }
  }
  // What the embeddings add to grad_q of a lane, and s = G_s.
  void add_embeddings(const Tile& t, const Met* met, int count, int lane, float* s, int64_t h, const Work& w) const {
    float g[kSlots] = {0, 0, 0, 0};
    float* row = w.turn + lane * Dp;
    for (int k = 0; k < count; ++k)
      for (int i = 0; i < kSlots; ++i) {
        if (!(met[k].slots >> i & 1)) continue;
        const bool alone = met[k].slots == 1u << i;
        g[i] = t.sum[k * L + lane] * (alone ? 1.0f : expf(s[i] - t.shift[k * L + lane]));
        const float* e = a.slot_embed + (i * a.H + h) * D;
        for (int j = 0; j < D; j += W) store(row + j, fma(set1(g[i]), load_n(e + j, lesser(W, D - j)), load(row + j)));
      }
    for (int i = 0; i < kSlots; ++i) s[i] = g[i];
  }

  // ---- driving a pass

  template <int PASS>
  void lay_work(Bump& bump, Work& w, int group) const {
    const bool copied = PASS != kForward || !in_place();
    w.in_place = bump.take<const char*>(copied ? 0 : kChunk);
    w.rows1 = bump.take<uint32_t>(copied ? static_cast<int64_t>(kChunk) * Dpu : 0);
    w.rows2 = bump.take<uint32_t>(static_cast<int64_t>(kChunk) * Dpu);
    w.tall1 = w.rows1, w.tall2 = w.rows2;
    w.s = bump.take<float>(kChunk * L), w.dp = bump.take<float>(PASS == kForward ? 0 : kChunk * L);
    w.p = reinterpret_cast<uint32_t*>(w.s), w.ds = reinterpret_cast<uint32_t*>(w.dp);
    if (U == 2) {
      w.tall1 = bump.take<uint32_t>(PASS == kForward ? 0 : static_cast<int64_t>(kChunk) / U * Dp);
      w.tall2 = bump.take<uint32_t>(static_cast<int64_t>(kChunk) / U * Dp);
      w.p = bump.take<uint32_t>(kChunk / U * L), w.ds = bump.take<uint32_t>(kChunk / U * L);
    }
    w.max = bump.take<float>(L), w.alpha = bump.take<float>(L), w.zero = bump.take<float>(L);
    w.row_lse = bump.take<float>(kChunk), w.row_delta = bump.take<float>(kChunk);
    w.row_shift = bump.take<float>(kChunk);
    w.turn = bump.take<float>(static_cast<int64_t>(L) * Dp);
    for (int i = 0; i < group; ++i) {
      Tile& t = w.tiles[i];
      t.x1 = bump.take<uint32_t>(static_cast<int64_t>(Du) * L);
      t.acc1 = bump.take<float>(static_cast<int64_t>(Dp) * L);
      if (PASS != kForward) t.x2 = bump.take<uint32_t>(static_cast<int64_t>(Du) * L);
      if (PASS == kGradKV) t.acc2 = bump.take<float>(static_cast<int64_t>(Dp) * L);
      if (PASS != kGradKV) {
        t.m = bump.take<float>(L), t.l = bump.take<float>(L);
        t.shift = bump.take<float>(kSlots * L);
      }
      if (PASS == kGradQ) t.sum = bump.take<float>(kSlots * L);
    }
  }

  template <int PASS>
  bool drive() const {
    const int64_t blocks = (PASS == kGradKV ? a.rows : a.q_rows) * a.columns;
    int64_t group = lesser<int64_t>(kMaxGroup, tiles);
    auto tasks_of = [&] { return heads * blocks * divide_up(tiles, group); };
    while (group > 1 && tasks_of() < 4 * parallel.threads) group /= 2;
    const int64_t tasks = tasks_of(), groups = divide_up(tiles, group);
    if (tasks == 0) return true;

    const int slots = static_cast<int>(lesser<int64_t>(greater(1, parallel.threads), tasks));
    Bump size;
    Work unused;
    lay_work<PASS>(size, unused, static_cast<int>(group));
    Scratch scratch;
    const int64_t work_at = scratch.reserve(size.used * slots);
    if (!scratch.make()) return false;

    for_each_task(parallel, tasks, [&](int thread, int64_t task) {
      Work w;
      Bump bump{scratch.at<char>(work_at + thread * size.used)};
      lay_work<PASS>(bump, w, static_cast<int>(group));
      const int64_t head = task / groups / blocks, b = head / a.H, h = head % a.H;
      const int64_t index = task / groups % blocks, row = index / a.columns, column = index % a.columns;
      const int64_t first = task % groups * group;
      const int n = static_cast<int>(lesser(group, tiles - first));
      Met met[kSlots];
      const int count = PASS == kGradKV ? seeing(row, column, met) : seen(a.q_row + row, column, met);
      if (PASS == kGradKV) fill(w.zero, L, 0.0f);
      for (int i = 0; i < n; ++i) {
        Tile& t = w.tiles[i];
        const int64_t start = (first + i) * L;
        t.count = static_cast<int>(lesser<int64_t>(L, in_block - start));
        for_each_token(row, column, start, t.count, [&](int lane, int64_t token) { t.token[lane] = token; });
        begin<PASS>(t, met, count, b, h, w);
      }
      chunks<PASS>(met, count, [&](const Chunk& c, const Chunk* next) {
        gather<PASS>(c, met, b, h, w);
        for (int i = 0; i < n; ++i) step<PASS>(w.tiles[i], c, i ? nullptr : next, b, h, w);
      });
      for (int i = 0; i < n; ++i) finish<PASS>(w.tiles[i], met, count, b, h, w);
    });
    scratch.drop();
    return true;
  }

  // f(b, h, run, token) for all queries, in tasks of kRun of them.
  int64_t runs() const { return divide_up(q_count, kRun); }
  template <class F>
  void for_each_run(const F& f) const {
    for_each_task(parallel, heads * runs(), [&](int, int64_t task) {
      const int64_t head = task / runs(), first = task % runs() * kRun;
      f(head / a.H, head % a.H, task, first, lesser(q_count, first + kRun));
    });
  }

  // delta_i = grad_out_i . out_i - grad_lse_i, and scale q_i . e_s again.
  void prepare() const {
    for_each_run([&](int64_t b, int64_t h, int64_t, int64_t first, int64_t end) {
      for (int64_t n = first; n < end; ++n) {
        const int64_t i = (b * a.H + h) * q_count + n;
        const T *g = at<T>(a.grad_out, b, h, n), *o = at<T>(a.out, b, h, n);
        V sum = zero();
        for (int j = 0; j < D; j += W) sum = fma(load_n(g + j, lesser(W, D - j)), load_n(o + j, lesser(W, D - j)), sum);
        const int64_t* stride = a.grad_lse_stride;
        delta[i] = hsum(sum) - (a.grad_lse ? a.grad_lse[b * stride[0] + h * stride[1] + n * stride[2]] : 0.0f);
        if (a.slot_embed) embed(at<T>(a.q, b, h, n), h, slots_of(i));
      }
    });
  }

  // grad_e_s = scale sum_i G_is q_i: per run in float32, over the runs and the batch in order.
  void embeddings(float* part) const {
    for_each_run([&](int64_t b, int64_t h, int64_t run, int64_t first, int64_t end) {
      float* sum = part + run * kSlots * Dp;
      fill(sum, static_cast<int64_t>(kSlots) * Dp, 0.0f);
      for (int64_t n = first; n < end; ++n) {
        const T* q = at<T>(a.q, b, h, n);
        for (int s = 0; s < kSlots; ++s) {
          const float g = slot[((b * a.H + h) * q_count + n) * kSlots + s];
          if (g == 0.0f) continue;  // a slot that is not filled: q may be anything
          for (int j = 0; j < D; j += W) {
            float* x = sum + s * Dp + j;
            store(x, fma(set1(g), load_n(q + j, lesser(W, D - j)), load(x)));
          }
        }
      }
    });
    for (int s = 0; s < kSlots; ++s)
      for (int64_t h = 0; h < a.H; ++h)
        for (int d = 0; d < D; ++d) {
          double sum = 0;
          for (int64_t b = 0; b < a.B; ++b)
            for (int64_t run = 0; run < runs(); ++run)
              sum += static_cast<double>(part[(((b * a.H + h) * runs() + run) * kSlots + s) * Dp + d]);
          a.grad_slot_embed[(s * a.H + h) * D + d] = a.scale * static_cast<float>(sum);
        }
  }

  bool run_forward() const { return drive<kForward>(); }

  bool run_backward() {
    Scratch scratch;
    const int64_t bytes = static_cast<int64_t>(sizeof(float)), queries = heads * q_count;
    const int64_t deltas = scratch.reserve(queries * bytes);
    const int64_t slots = scratch.reserve(a.slot_embed ? kSlots * queries * bytes : 0);
    const int64_t parts = scratch.reserve(a.slot_embed ? kSlots * Dp * heads * runs() * bytes : 0);
    if (!scratch.make()) return false;
    delta = scratch.at<float>(deltas);
    slot = a.slot_embed ? scratch.at<float>(slots) : nullptr;
    prepare();
    const bool done = drive<kGradKV>() && drive<kGradQ>();
    if (done && a.slot_embed) embeddings(scratch.at<float>(parts));
    scratch.drop();
    return done;
  }
};

template <class F>
bool with_type(const BlockCausalAttentionArgs& a, const Parallel& p, const F& f) {
  if (a.dtype == DType::kFloat32) return f(Op<float>{a, p});
  if (a.dtype == DType::kFloat16) return f(Op<f16>{a, p});
  return f(Op<bf16>{a, p});
}

bool forward(const BlockCausalAttentionArgs& a, const Parallel& p) {
  return with_type(a, p, [](auto op) { return op.run_forward(); });
}
bool backward(const BlockCausalAttentionArgs& a, const Parallel& p) {
  return with_type(a, p, [](auto op) { return op.run_backward(); });
}

}  // namespace

const BlockCausalAttentionKernels block_causal_attention = {forward, backward};

}  // namespace LINATTN_ISA
}  // namespace linattn
