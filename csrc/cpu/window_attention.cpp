// Two-dimensional sliding-window attention, forward and backward (meaning: window_attention.h; gradients: docs).
//
// Softmax with one side in the lanes of registers and the other side in rows. The lanes hold a tile: a patch of
// tile_rows x 8 tokens of the grid, or a run of text or pooled tokens. Rows come by chunks of 64 tokens, gathered from
// anywhere:
//
//   forward, grad_q    lanes are queries, rows the keys that they see
//   grad_k, grad_v     lanes are keys, rows the queries that see them (the disk is symmetric)
//
//   S[64, lanes] = K Q^T, P = exp(S - max), O^T[D, lanes] = O^T alpha + V^T P
//
// so that maxima, sums and rescaling go lane by lane, K and V enter the products (tile.h) by broadcasts in their own
// layout, and only q and out are transposed, once per tile. A tile's window is visited row by row of the grid: each row
// gives the run of columns that at least one token of the tile can see (for radius 8 and a tile of 4 x 8, 364 tokens
// for 193 live ones per query; whole 8 x 8 key tiles would be 560). Tokens that not all lanes see carry, per grid row,
// half the width of the disk at the height of each lane: live is |x - x'| <= that, some six operations per register, no
// division. Text and pooled rows are not masked and serve several tiles per gathered chunk.
//
// Bytes: neighbouring tiles share most of their window, which stays in L2; memory sees q, k, v once and out once. What
// the next chunk needs is fetched while this one is multiplied. k is not even copied where its layout is that of an
// operand (float32, and bfloat16 in pairs).
// Backward recomputes P from lse: one pass for grad_q (3 products), one for grad_k and grad_v (4), no atomics.
// Long runs (text queries over all keys; text and pooled keys over all queries) are cut into splits by the sizes alone,
// whose partial results are merged in order: the same bits for any thread count and batch.
//
// A masked pair has weight 0, but 0 times NaN is NaN: where a masked chunk holds a row that is not finite, that row is
// taken out of the product and added lane by lane.
#include "window_attention.h"

#include <math.h>

#include "softmax.h"

namespace linattn {
namespace LINATTN_ISA {
namespace {

constexpr int kChunk = 64;       // rows per step; a multiple of kRowPad and of every unit
constexpr int kTileColumns = 8;  // of a patch of the grid
constexpr int kMaxLanes = 64;
constexpr int kMaxGroup = 4;           // tiles that share a gathered chunk
constexpr int64_t kMinSplit = 8192;    // rows per split, at least; and
constexpr int64_t kSplitPerLane = 64;  // ... per token in the lanes: keeps partial results small beside the tensors
constexpr int kAhead = 3;              // rows of the next chunk that are fetched per register block
constexpr int64_t kRun = 512;          // tokens per task of simple loops

enum Pass { kForward, kGradQ, kGradKV };

alignas(64) const float kLaneColumn[kMaxLanes] = {
    0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7,
    0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7,
};

// Tokens in lanes: lane 8 j + i holds token + j * step + i where i < columns_of(j), nothing elsewhere.
struct Patch {
  int64_t token = 0, step = kTileColumns;
  int64_t y = 0, x = 0;  // of lane 0 in the grid
  int rows = 0, columns = kTileColumns;
  int count = 0;  // lanes up to the last used row
  int columns_of(int j) const { return greater(0, lesser(columns, count - j * kTileColumns)); }
};

// Rows: a chunk of tokens. limit[i] is null where all lanes see row i, else lane l sees it if |column of l - x| <
// limit.
struct Chunk {
  int n = 0, tile = 0;  // tile: of a window
  bool masked = false, pooled = false;
  int64_t token[kChunk];
  float x[kChunk];
  const float* limit[kChunk];
};

struct Run {
  int64_t token = 0, count = 0;
  bool pooled = false;
};

// Tokens that go into lanes, and the rows that each of their tiles meets: up to two runs, and the window.
struct Region {
  bool grid = false, pooled = false;
  int64_t token = 0, count = 0;  // the first token; not a grid: how many
  int64_t row = 0, end_row = 0;  // grid rows
  Run runs[2];
  bool window = false;  // the image rows [w_row, w_end) begin at w_token
  int64_t w_token = 0, w_row = 0, w_end = 0;
  int64_t splits = 1, split_length = 0;
  int64_t tiles = 0, tiles_x = 0, tiles_y = 0, groups = 0;  // a group is a column of tiles
  int64_t first_task = 0, partials = 0;
};

struct Tile {
  Patch patch;
  uint32_t *x1, *x2;   // lanes side [Du][L]: q | q, grad_out | k, v
  float *acc1, *acc2;  // [Dp][L]: out | grad_q | grad_k, grad_v
  float *m, *l;        // [L]: running maximum and sum; in kGradQ lse and delta
};

struct Work {                  // one slot's scratch
  uint32_t *rows1, *rows2;     // [kChunk][Dp / U]: k, v | k, v | q, grad_out
  const char** in_place;       // [kChunk]: instead of rows1 the rows of k where they lie
  uint32_t *tall1, *tall2;     // the same paired along rows [kChunk / U][Dp]; for one value per unit the same memory
  float *s, *dp;               // [kChunk][L]
  uint32_t *p, *ds;            // [kChunk / U][L]; for one value per unit over s and dp
  float* limits;               // [kChunk][L]
  float *max, *alpha;          // [L]
  float *row_lse, *row_delta;  // [kChunk]
  float* turn;                 // [L][Dp]
  Tile tiles[kMaxGroup];
};

// ------------------------------------------------------------------------------------------------ epilogues

// S = scale * block, -inf where masked; with max also the running maximum of each lane.
struct Scores {
  float* S;
  int64_t ld;
  float* max;
  float scale;
  const Chunk& chunk;
  template <int R, int N>
  LINATTN_INLINE void operator()(V (&acc)[R][N], int r, int column) const {
    V m[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) m[j] = max ? load(max + column + j * V::W) : zero();
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      if (r + i >= chunk.n) break;
      const float* limit = chunk.limit[r + i];
      V x = set1(chunk.x[r + i]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        V s = acc[i][j] * set1(scale);
        if (limit) {
          int lane = column + j * V::W;
          V dx = load(kLaneColumn + lane) - x;
          s = if_positive(load(limit + lane) - vmax(dx, zero() - dx), s, set1(-kInfinity));
        }
        m[j] = vmax(m[j], s);
        store(S + (r + i) * ld + column + j * V::W, s);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j)
      if (max) store(max + column + j * V::W, m[j]);
  }
};

// ------------------------------------------------------------------------------------------------------ ops

template <class T>
struct Op {
  using M = typename Multiply<T>::M;
  // Of exp: the shortest one would show in lse, which is float32 for every type.
  static constexpr int U = M::U, W = V::W, kDegree = greater(4, exp_degree<T>);

  const WindowAttentionArgs& a;
  const Parallel& parallel;
  const int D, Dp = round_up(D, kColPad), Du = divide_up(D, U), Dpu = Dp / U;
  const int64_t heads, radius, half_size;
  const int L, vectors;
  const int64_t image, q_image, q_count, k_count;  // tokens
  const int64_t q_image_at, q_text_at, k_image_at, k_text_at;
  int* half = nullptr;     // half[dy]: the largest dx with dx^2 + dy^2 < radius^2
  float* delta = nullptr;  // (B, H, queries)

  Op(const WindowAttentionArgs& args, const Parallel& p)
      : a(args),
        parallel(p),
        D(args.D),
        heads(args.B * args.H),
        radius(lesser(args.radius, greater<int64_t>(1, args.height + args.width))),
        half_size(lesser(radius, args.height)),
        // Small tiles visit fewer tokens, large ones reread less: 4 x 8 tokens, 8 x 8 for large windows (by
        // measurement).
        L(radius <= 20 ? 32 : 64),
        vectors(L / W),
        image(args.height * args.width),
        q_image(args.q_rows * args.width),
        q_count(args.q_text_length + q_image),
        k_count(args.text_length + image),
        q_image_at(args.text_first ? args.q_text_length : 0),
        q_text_at(args.text_first ? 0 : q_image),
        k_image_at(args.text_first ? args.text_length : 0),
        k_text_at(args.text_first ? 0 : image) {}

  // ---- rows

  // View of the rows' first and second tensor, and of the lanes'.
  template <int PASS>
  const View& rows1(bool pooled) const {
    return PASS == kGradKV ? a.q : pooled ? a.pooled_k : a.k;
  }
  template <int PASS>
  const View& rows2(bool pooled) const {
    return PASS == kGradKV ? a.grad_out : pooled ? a.pooled_v : a.v;
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
      for (int i = 0; i < c.n; i += 2, A += Dp) {
        const T* second = i + 1 < c.n ? p + c.token[i + 1] * x.stride_n : nullptr;
        pack_pair(p + c.token[i] * x.stride_n, second, D, A);
      }
    }
#endif
  }

  // k is read once per tile by forward, so it need not be copied where its values are units as they lie.
  bool in_place() const { return static_cast<int>(sizeof(T)) * U == 4 && D % U == 0; }

  template <int PASS>
  void gather(const Chunk& c, int64_t b, int64_t h, const Work& w) const {
    const View &x1 = rows1<PASS>(c.pooled), &x2 = rows2<PASS>(c.pooled);
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
        int64_t n = (b * a.H + h) * q_count + c.token[i];
        w.row_lse[i] = a.lse[n] == -kInfinity ? 0.0f : a.lse[n];  // such a query has no weight anywhere
        w.row_delta[i] = delta[n];
      }
  }

  // f(chunk, next) for the run [first, last) of tokens; next is null at the end.
  template <class F>
  void dense_chunks(const Run& run, int64_t first, int64_t last, const F& f) const {
    Chunk chunks[2];
    for (Chunk& c : chunks) {
      c.pooled = run.pooled;
      for (int i = 0; i < kChunk; ++i) c.limit[i] = nullptr, c.x[i] = 0;
    }
    auto make = [&](Chunk& c, int64_t n) {
      c.n = static_cast<int>(greater<int64_t>(0, lesser<int64_t>(kChunk, last - n)));
      for (int i = 0; i < c.n; ++i) c.token[i] = run.token + n + i;
    };
    Chunk *now = &chunks[0], *next = &chunks[1];
    make(*now, first);
    for (int64_t n = first; n < last; n += kChunk) {
      make(*next, n + kChunk);
      f(*now, next->n ? next : nullptr);
      Chunk* done = now;
      now = next, next = done;
    }
  }

  // f(chunk, next) for the tokens of the image rows [w_row, w_end) that each of the tiles can see.
  template <class F>
  void window_chunks(const Region& g, const Tile* tiles, int count, float* limits, const F& f) const {
    Chunk chunks[2];
    Chunk *waiting = nullptr, *c = &chunks[0];
    int used = 0;
    auto full = [&] {
      if (waiting) f(*waiting, c);
      waiting = c;
      c = c == &chunks[0] ? &chunks[1] : &chunks[0];
      c->n = 0, c->masked = false, used = 0;
    };
    for (int tile = 0; tile < count; ++tile) {
      const Patch& p = tiles[tile].patch;
      const int64_t bottom = p.y + p.rows - 1, right = p.x + p.columns - 1;
      for (int64_t y = greater(g.w_row, p.y - radius + 1); y < lesser(g.w_end, bottom + radius); ++y) {
        int64_t near = greater<int64_t>(0, greater(p.y - y, y - bottom)), far = greater(y - p.y, bottom - y);
        int64_t reach = half[near], all = far < half_size ? half[far] : -1;
        int64_t begin = greater<int64_t>(0, p.x - reach), end = lesser(a.width, right + reach + 1);
        float* limit = nullptr;
        for (int64_t x = begin; x < end; ++x) {
          if (c->n == kChunk) full(), limit = nullptr;
          bool live = greater(right - x, x - p.x) <= all;
          if (!live && !limit) {
            limit = limits + ((c - chunks) * kChunk + used++) * L;
            for (int j = 0; j < L / kTileColumns; ++j) {
              int64_t dy = y - p.y - j;
              dy = dy < 0 ? -dy : dy;
              float reached = dy < half_size ? static_cast<float>(half[dy]) + 0.5f : -0.5f;
              for (int i = 0; i < kTileColumns; ++i) limit[j * kTileColumns + i] = reached;
            }
          }
          c->tile = tile;
          c->token[c->n] = g.w_token + (y - g.w_row) * a.width + x;
          c->x[c->n] = static_cast<float>(x - p.x);
          c->limit[c->n++] = live ? nullptr : limit;
          c->masked = c->masked || !live;
        }
      }
      if (c->n) full();
    }
    if (waiting) f(*waiting, nullptr);
  }

  // ---- rows that are not finite

  static bool sees(const Chunk& c, int row, int lane) {
    float dx = kLaneColumn[lane] - c.x[row];
    return !c.limit[row] || (dx < 0 ? -dx : dx) < c.limit[row][lane];
  }

  // Takes the rows that are not finite out of a tall operand of c.n rows, and lists them.
  int take_out(const Chunk& c, uint32_t* A, int* taken) const {
    const int rows = divide_up(c.n, U);
    V bad[4] = {zero(), zero(), zero(), zero()};
    for (int i = 0; i < rows; i += 4)
      for (int j = 0; j < D; j += W)
        LINATTN_EACH(r, 4) bad[r] = M::mac(bad[r], load(A + lesser(i + r, rows - 1) * Dp + j), zero());
    if (hsum((bad[0] + bad[1]) + (bad[2] + bad[3])) == 0.0f) return 0;
    int count = 0;
    for (int i = 0; i < c.n; ++i) {
      bool finite = true;
      for (int d = 0; d < D && finite; ++d) {
        uint32_t unit = A[i / U * Dp + d], exponent = U == 1 ? unit : i % 2 ? unit & 0xffff0000u : unit << 16;
        finite = (exponent & 0x7f800000u) != 0x7f800000u;
      }
      if (finite) continue;
      taken[count++] = i;
      for (int d = 0; d < D; ++d) A[i / U * Dp + d] &= U == 1 ? 0u : i % 2 ? 0x0000ffffu : 0xffff0000u;
    }
    return count;
  }
  // Adds them, weighted by the operand P, for the lanes that see them.
  void put_back(const View& x, int64_t b, int64_t h, const Chunk& c, const int* taken, int count, const uint32_t* P,
                float* acc) const {
    for (int k = 0; k < count; ++k) {
      const int i = taken[k];
      const T* p = at<T>(x, b, h, c.token[i]);
      for (int lane = 0; lane < L; ++lane) {
        if (!sees(c, i, lane)) continue;
        uint32_t unit = P[i / U * L + lane], bits = U == 1 ? unit : i % 2 ? unit & 0xffff0000u : unit << 16;
        float weight;
        memcpy(&weight, &bits, 4);
        for (int d = 0; d < D; ++d) {
          float lanes[W];
          store(lanes, load_n(p + d, 1));
          acc[d * L + lane] += weight * lanes[0];
        }
      }
    }
  }

  // acc (+)= A^T P over the rows of a chunk.
  template <class Epilogue>
  void accumulate(const View& x, int64_t b, int64_t h, const Chunk& c, uint32_t* A, const uint32_t* P, float* acc,
                  const Epilogue& epilogue, Ahead& ahead) const {
    int taken[kChunk], count = c.masked ? take_out(c, A, taken) : 0;
    gemm<M, true>(D, vectors, divide_up(c.n, U), A, Dp, P, L, Fetching<Epilogue>{epilogue, ahead, kAhead});
    if (count) put_back(x, b, h, c, taken, count, P, acc);
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

  // P = exp(S - lse) and dS = P (dP - delta). Masked pairs are 0 whatever lse, dP and delta are: they may be NaN.
  template <int PASS>
  void differentiate(const Tile& t, int n, bool masked, const Work& w) const {
    for (int column = 0; column < L; column += W) {
      for (int i = 0; i < n; i += 4) {
        V x[4], g[4];
        LINATTN_EACH(r, 4) {
          V lse = PASS == kGradQ ? load(t.m + column) : set1(i + r < n ? w.row_lse[i + r] : 0.0f);
          V s = load(w.s + (i + r) * L + column);
          x[r] = i + r < n ? s - lse : set1(-kInfinity);
          if (masked) x[r] = if_positive(set1(kLowest) - s, set1(-kInfinity), x[r]);
        }
        exp_neg<kDegree>(x);
        LINATTN_EACH(r, 4) {
          V d = PASS == kGradQ ? load(t.l + column) : set1(i + r < n ? w.row_delta[i + r] : 0.0f);
          g[r] = x[r] * if_positive(x[r], load(w.dp + (i + r) * L + column) - d, zero());
        }
        if (PASS == kGradKV) store_weights<U>(w.p, L, i, column, x);
        store_weights<U>(w.ds, L, i, column, g);
      }
    }
  }

  template <int PASS>
  void step(const Tile& t, const Chunk& c, const Chunk* next, int64_t b, int64_t h, const Work& w) const {
    const View &x1 = rows1<PASS>(c.pooled), &x2 = rows2<PASS>(c.pooled);
    constexpr int64_t size = sizeof(T);
    Ahead ahead{next ? next->token : nullptr,
                next ? next->n : 0,
                reinterpret_cast<const char*>(at<T>(x1, b, h, 0)),
                reinterpret_cast<const char*>(at<T>(x2, b, h, 0)),
                x1.stride_n * size,
                x2.stride_n * size,
                static_cast<int>(D * size)};
    const Scores scores{w.s, L, PASS == kForward ? w.max : nullptr, a.scale, c};
    if (PASS == kForward)
      for (int i = 0; i < L; i += W) store(w.max + i, load(t.m + i));
    const Fetching<Scores> epilogue{scores, ahead, kAhead};
    if (PASS == kForward && in_place())
      gemm_rows<M>(c.n, vectors, Du, w.in_place, t.x1, L, epilogue);
    else
      gemm<M, false>(c.n, vectors, Du, w.rows1, Dpu, t.x1, L, epilogue);
    if constexpr (PASS == kForward) {
      softmax(t, c.n, w);
      accumulate(x2, b, h, c, w.tall2, w.p, t.acc1, Rescale{t.acc1, L, w.alpha}, ahead);
    } else {
      gemm<M, false>(c.n, vectors, Du, w.rows2, Dpu, t.x2, L, StoreTo{w.dp, L});
      differentiate<PASS>(t, c.n, c.masked, w);
      accumulate(x1, b, h, c, w.tall1, w.ds, t.acc1, AddTo{t.acc1, L}, ahead);
      if (PASS == kGradKV) accumulate(x2, b, h, c, w.tall2, w.p, t.acc2, AddTo{t.acc2, L}, ahead);
    }
  }

  // ---- tiles

  Patch patch_of(const Region& g, int64_t index) const {
    Patch p;
    if (g.grid) {
      int64_t ty = index / g.tiles_x, tx = index % g.tiles_x, tile_rows = L / kTileColumns;
      p.y = g.row + ty * tile_rows, p.x = tx * kTileColumns;
      p.rows = static_cast<int>(lesser(tile_rows, g.end_row - p.y));
      p.columns = static_cast<int>(lesser<int64_t>(kTileColumns, a.width - p.x));
      p.step = a.width, p.token = g.token + (p.y - g.row) * a.width + p.x;
      p.count = p.rows * kTileColumns;
    } else {
      p.token = g.token + index * L;
      p.count = static_cast<int>(lesser<int64_t>(L, g.count - index * L));
      p.rows = divide_up(p.count, kTileColumns);
    }
    return p;
  }
  // f(lane, token)
  template <class F>
  void for_each_lane(const Patch& p, const F& f) const {
    for (int j = 0; j < p.rows; ++j)
      for (int i = 0; i < p.columns_of(j); ++i) f(j * kTileColumns + i, p.token + j * p.step + i);
  }

  void pack_lanes(const View& x, int64_t b, int64_t h, const Patch& p, uint32_t* dst, const Work& w) const {
    auto* rows = reinterpret_cast<uint32_t*>(w.turn);
    if (p.count < L || p.columns < kTileColumns)
      memset(rows, 0, sizeof(uint32_t) * static_cast<size_t>(L) * static_cast<size_t>(Dpu));
    for_each_lane(p, [&](int lane, int64_t token) { pack_row(at<T>(x, b, h, token), D, rows + lane * Dpu); });
    transpose_units(rows, Dpu, L, Du, dst, L);
  }
  void write_lanes(const float* acc, const View& x, int64_t b, int64_t h, const Patch& p, const float* factor,
                   const Work& w) const {
    transpose_units(reinterpret_cast<const uint32_t*>(acc), L, D, L, reinterpret_cast<uint32_t*>(w.turn), Dp);
    for_each_lane(p, [&](int lane, int64_t token) {
      T* out = at<T>(x, b, h, token);
      for (int j = 0; j < D; j += W)
        store_n(out + j, load(w.turn + lane * Dp + j) * set1(factor[lane]), lesser(W, D - j));
    });
  }
  static void fill(float* x, int64_t n, float value) {
    for (int64_t i = 0; i < n; i += W) store(x + i, set1(value));
  }

  template <int PASS>
  void begin(const Tile& t, bool pooled, int64_t b, int64_t h, const Work& w) const {
    const View& x1 = PASS != kGradKV ? a.q : pooled ? a.pooled_k : a.k;
    pack_lanes(x1, b, h, t.patch, t.x1, w);
    fill(t.acc1, static_cast<int64_t>(Dp) * L, 0.0f);
    if (PASS == kForward) fill(t.m, L, kLowest), fill(t.l, L, 0.0f);
    if (PASS == kGradQ) {
      pack_lanes(a.grad_out, b, h, t.patch, t.x2, w);
      fill(t.m, L, 0.0f), fill(t.l, L, 0.0f);
      for_each_lane(t.patch, [&](int lane, int64_t token) {
        int64_t n = (b * a.H + h) * q_count + token;
        t.m[lane] = a.lse[n] == -kInfinity ? 0.0f : a.lse[n];
        t.l[lane] = delta[n];
      });
    }
    if (PASS == kGradKV) {
      pack_lanes(pooled ? a.pooled_v : a.v, b, h, t.patch, t.x2, w);
      fill(t.acc2, static_cast<int64_t>(Dp) * L, 0.0f);
    }
  }

  template <int PASS>
  void finish(const Tile& t, bool pooled, int64_t b, int64_t h, const Work& w) const {
    if (PASS == kForward) {
      for (int i = 0; i < L; ++i) w.alpha[i] = t.l[i] == 0.0f ? 0.0f : 1.0f / t.l[i];  // 0: sees no key
      write_lanes(t.acc1, a.out, b, h, t.patch, w.alpha, w);
      for_each_lane(t.patch, [&](int lane, int64_t token) {
        a.lse[(b * a.H + h) * q_count + token] = t.l[lane] == 0.0f ? -kInfinity : t.m[lane] + logf(t.l[lane]);
      });
    } else {
      fill(w.alpha, L, a.scale);
      write_lanes(t.acc1, PASS == kGradQ ? a.grad_q : pooled ? a.grad_pooled_k : a.grad_k, b, h, t.patch, w.alpha, w);
    }
    if (PASS == kGradKV) {
      fill(w.alpha, L, 1.0f);
      write_lanes(t.acc2, pooled ? a.grad_pooled_v : a.grad_v, b, h, t.patch, w.alpha, w);
    }
  }

  // t += u, in the order of the splits.
  template <int PASS>
  void merge(const Tile& t, const Tile& u) const {
    for (int column = 0; column < L; column += W) {
      V f[2] = {set1(1.0f), set1(1.0f)};
      if (PASS == kForward) {
        V mt = load(t.m + column), mu = load(u.m + column), m = vmax(mt, mu);
        f[0] = mt - m, f[1] = mu - m;
        exp_neg<6>(f);
        store(t.m + column, m);
        store(t.l + column, load(t.l + column) * f[0] + load(u.l + column) * f[1]);
      }
      for (int d = 0; d < D; ++d) {
        int i = d * L + column;
        store(t.acc1 + i, load(t.acc1 + i) * f[0] + load(u.acc1 + i) * f[1]);
        if (PASS == kGradKV) store(t.acc2 + i, load(t.acc2 + i) + load(u.acc2 + i));
      }
    }
  }

  // ---- driving a pass

  static constexpr int64_t accumulators(int pass) { return pass == kGradKV ? 2 : 1; }
  template <int PASS>
  void lay_accumulators(Bump& bump, Tile& t) const {
    t.acc1 = bump.take<float>(static_cast<int64_t>(Dp) * L);
    if (PASS == kGradKV) t.acc2 = bump.take<float>(static_cast<int64_t>(Dp) * L);
    if (PASS == kForward) t.m = bump.take<float>(L), t.l = bump.take<float>(L);
  }
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
    w.limits = bump.take<float>(2 * kChunk * L);
    w.max = bump.take<float>(L), w.alpha = bump.take<float>(L);
    w.row_lse = bump.take<float>(kChunk), w.row_delta = bump.take<float>(kChunk);
    w.turn = bump.take<float>(static_cast<int64_t>(L) * Dp);
    for (int i = 0; i < group; ++i) {
      Tile& t = w.tiles[i];
      t.x1 = bump.take<uint32_t>(static_cast<int64_t>(Du) * L);
      if (PASS != kForward) t.x2 = bump.take<uint32_t>(static_cast<int64_t>(Du) * L);
      if (PASS == kGradQ) t.m = bump.take<float>(L), t.l = bump.take<float>(L);
      lay_accumulators<PASS>(bump, t);
    }
  }

  int64_t tasks_of(Region* regions, int count, int group) const {
    int64_t tasks = 0;
    for (Region* g = regions; g < regions + count; ++g) {
      g->tiles_x = g->grid ? divide_up<int64_t>(a.width, kTileColumns) : 1;
      g->tiles_y =
          g->grid ? divide_up<int64_t>(g->end_row - g->row, L / kTileColumns) : divide_up<int64_t>(g->count, L);
      g->tiles = g->tiles_x * g->tiles_y;
      g->groups = g->tiles_x * divide_up<int64_t>(g->tiles_y, group);
      g->first_task = tasks;
      tasks += heads * g->groups * g->splits;
    }
    return tasks;
  }

  template <int PASS>
  bool drive(Region* regions, int count) const {
    // Splits by the sizes alone.
    for (Region* g = regions; g < regions + count; ++g) {
      g->split_length = greater(g->runs[0].count, g->runs[1].count);
      if (g->grid) continue;
      int64_t least = greater<int64_t>(kMinSplit, kSplitPerLane * g->count);
      g->splits = greater<int64_t>(1, divide_up(g->runs[0].count, least));
      g->split_length = round_up<int64_t>(divide_up(g->runs[0].count, g->splits), kChunk);
    }
    int group = kMaxGroup;
    int64_t tasks = tasks_of(regions, count, group);
    while (group > 1 && tasks < 4 * parallel.threads) tasks = tasks_of(regions, count, group /= 2);
    if (tasks == 0) return true;

    int slots = static_cast<int>(lesser<int64_t>(greater(1, parallel.threads), tasks));
    Bump size, partial;
    Work unused;
    lay_work<PASS>(size, unused, group);
    lay_accumulators<PASS>(partial, unused.tiles[0]);
    Scratch scratch;
    int64_t work_at = scratch.reserve(size.used * slots), merges = 0;
    for (Region* g = regions; g < regions + count; ++g)
      if (g->splits > 1) {
        g->partials = scratch.reserve(partial.used * heads * g->tiles * g->splits);
        merges += heads * g->tiles;
      }
    if (!scratch.make()) return false;
    auto work_of = [&](int slot, Work& w) {
      Bump bump{scratch.at<char>(work_at + slot * size.used)};
      lay_work<PASS>(bump, w, group);
    };
    auto use_partial = [&](const Region& g, int64_t head, int64_t tile, int64_t split, Tile& t) {
      Bump bump{scratch.at<char>(g.partials) + ((head * g.tiles + tile) * g.splits + split) * partial.used};
      lay_accumulators<PASS>(bump, t);
    };

    for_each_task(parallel, tasks, [&](int slot, int64_t task) {
      const Region* g = regions + count - 1;
      while (task < g->first_task || g->groups == 0) --g;
      Work w;
      work_of(slot, w);
      task -= g->first_task;
      int64_t split = task % g->splits, group_index = task / g->splits % g->groups, head = task / g->splits / g->groups;
      int64_t b = head / a.H, h = head % a.H;
      int64_t first = group_index / g->tiles_x * group, column = group_index % g->tiles_x;
      int n = static_cast<int>(lesser<int64_t>(group, g->tiles_y - first));
      for (int i = 0; i < n; ++i) {
        Tile& t = w.tiles[i];
        t.patch = patch_of(*g, (first + i) * g->tiles_x + column);
        if (g->splits > 1) use_partial(*g, head, first + i, split, t);
        begin<PASS>(t, g->pooled, b, h, w);
      }
      auto dense = [&](const Run& run) {
        int64_t from = split * g->split_length, to = lesser(run.count, from + g->split_length);
        dense_chunks(run, from, to, [&](const Chunk& c, const Chunk* next) {
          gather<PASS>(c, b, h, w);
          for (int i = 0; i < n; ++i) step<PASS>(w.tiles[i], c, i ? nullptr : next, b, h, w);
        });
      };
      dense(g->runs[0]);
      if (g->window)
        window_chunks(*g, w.tiles, n, w.limits, [&](const Chunk& c, const Chunk* next) {
          gather<PASS>(c, b, h, w);
          step<PASS>(w.tiles[c.tile], c, next, b, h, w);
        });
      dense(g->runs[1]);
      if (g->splits == 1)
        for (int i = 0; i < n; ++i) finish<PASS>(w.tiles[i], g->pooled, b, h, w);
    });

    if (merges)
      for_each_task(parallel, merges, [&](int slot, int64_t task) {
        Work w;
        work_of(slot, w);
        for (const Region* g = regions; g < regions + count; ++g) {
          if (g->splits == 1) continue;
          if (task >= heads * g->tiles) {
            task -= heads * g->tiles;
            continue;
          }
          int64_t head = task / g->tiles, tile = task % g->tiles;
          Tile t = w.tiles[0], u = t;
          t.patch = patch_of(*g, tile);
          use_partial(*g, head, tile, 0, t);
          for (int64_t split = 1; split < g->splits; ++split) {
            use_partial(*g, head, tile, split, u);
            merge<PASS>(t, u);
          }
          finish<PASS>(t, g->pooled, head / a.H, head % a.H, w);
          return;
        }
      });
    scratch.drop();
    return true;
  }

  // ---- what meets what

  // Forward and grad_q.
  template <int PASS>
  bool drive_queries() const {
    Region g[2];
    g[0].token = q_text_at, g[0].count = a.q_text_length;
    g[0].runs[0] = {0, k_count, false};
    g[1].grid = true, g[1].token = q_image_at, g[1].row = a.q_row, g[1].end_row = a.q_row + a.q_rows;
    g[1].runs[0] = {k_text_at, a.text_length, false};
    g[1].runs[1] = {0, a.pooled, true};
    g[1].window = true, g[1].w_token = k_image_at, g[1].w_row = 0, g[1].w_end = a.height;
    return drive<PASS>(g, 2);
  }
  bool drive_keys() const {
    Region g[3];
    g[0].token = k_text_at, g[0].count = a.text_length;
    g[0].runs[0] = {0, q_count, false};
    g[1].pooled = true, g[1].count = a.pooled;
    g[1].runs[0] = {q_image_at, q_image, false};
    g[2].grid = true, g[2].token = k_image_at, g[2].row = 0, g[2].end_row = a.height;
    g[2].runs[0] = {q_text_at, a.q_text_length, false};
    g[2].window = true, g[2].w_token = q_image_at, g[2].w_row = a.q_row, g[2].w_end = a.q_row + a.q_rows;
    return drive<kGradKV>(g, 3);
  }

  void make_half(int* table) {
    half = table;
    int64_t dx = radius - 1;
    for (int64_t dy = 0; dy < half_size; ++dy) {
      while (dx * dx + dy * dy >= radius * radius) --dx;
      table[dy] = static_cast<int>(lesser(dx, a.width));
    }
  }

  bool run_forward() {
    if (heads == 0 || q_count == 0) return true;
    Scratch scratch;
    int64_t table = scratch.reserve(half_size * static_cast<int64_t>(sizeof(int)));
    if (!scratch.make()) return false;
    make_half(scratch.at<int>(table));
    bool done = drive_queries<kForward>();
    scratch.drop();
    return done;
  }

  // delta_i = grad_out_i . out_i - grad_lse_i
  void make_delta() const {
    int64_t runs = divide_up(q_count, kRun);
    for_each_task(parallel, heads * runs, [&](int, int64_t task) {
      int64_t head = task / runs, b = head / a.H, h = head % a.H, first = task % runs * kRun;
      for (int64_t n = first; n < lesser(q_count, first + kRun); ++n) {
        const T *g = at<T>(a.grad_out, b, h, n), *o = at<T>(a.out, b, h, n);
        V sum = zero();
        for (int j = 0; j < D; j += W) sum = fma(load_n(g + j, lesser(W, D - j)), load_n(o + j, lesser(W, D - j)), sum);
        const int64_t* stride = a.grad_lse_stride;
        float own = a.grad_lse ? a.grad_lse[b * stride[0] + h * stride[1] + n * stride[2]] : 0.0f;
        delta[head * q_count + n] = hsum(sum) - own;
      }
    });
  }

  bool run_backward() {
    if (heads == 0) return true;
    Scratch scratch;
    int64_t table = scratch.reserve(half_size * static_cast<int64_t>(sizeof(int)));
    int64_t deltas = scratch.reserve(heads * q_count * static_cast<int64_t>(sizeof(float)));
    if (!scratch.make()) return false;
    make_half(scratch.at<int>(table));
    delta = scratch.at<float>(deltas);
    make_delta();
    bool done = drive_queries<kGradQ>() && drive_keys();
    scratch.drop();
    return done;
  }
};

// --------------------------------------------------------------------------------------------------- pooling

template <class T>
struct Pool {
  static constexpr int W = V::W;
  const PoolTokensArgs& a;
  const Parallel& parallel;
  const int64_t heads = a.B * a.H, rows = divide_up(a.height, a.f), columns = divide_up(a.width, a.f);

  // f(y, x, weight index) for a patch: every weight with the token that it meets.
  template <class F>
  LINATTN_INLINE void for_each_weight(int64_t row, int64_t column, const F& f) const {
    for (int64_t i = 0; i < a.f; ++i)
      for (int64_t j = 0; j < a.f; ++j)
        f(lesser(row * a.f + i, a.height - 1), lesser(column * a.f + j, a.width - 1), i * a.f + j);
  }

  bool forward() const {
    for_each_task(parallel, heads * rows, [&](int, int64_t task) {
      int64_t b = task / rows / a.H, h = task / rows % a.H, row = task % rows;
      for (int64_t column = 0; column < columns; ++column) {
        T* out = at<T>(a.out, b, h, row * columns + column);
        for (int d = 0; d < a.D; d += W) {
          int w = lesser(W, a.D - d);
          V sum = zero();
          for_each_weight(row, column, [&](int64_t y, int64_t x, int64_t k) {
            sum = fma(set1(a.weight[k]), load_n(at<T>(a.x, b, h, y * a.width + x) + d, w), sum);
          });
          store_n(out + d, sum, w);
        }
      }
    });
    return true;
  }

  // A token lies in one patch, and meets one weight there or, at the edge, several.
  bool backward() const {
    const int64_t weights = a.f * a.f;
    Scratch scratch;
    int slots = static_cast<int>(greater<int64_t>(1, lesser<int64_t>(parallel.threads, heads * rows)));
    int64_t sums = scratch.reserve(4 * W * weights * slots), parts = scratch.reserve(4 * heads * rows * weights);
    if (!scratch.make()) return false;
    float* part = scratch.at<float>(parts);
    for_each_task(parallel, heads * rows, [&](int slot, int64_t task) {
      int64_t b = task / rows / a.H, h = task / rows % a.H, row = task % rows;
      float* sum = scratch.at<float>(sums) + slot * W * weights;
      for (int64_t k = 0; k < weights; ++k) store(sum + k * W, zero());
      for (int64_t column = 0; column < columns; ++column) {
        const T* g = at<T>(a.out, b, h, row * columns + column);
        for_each_weight(row, column, [&](int64_t y, int64_t x, int64_t k) {
          const T* p = at<T>(a.x, b, h, y * a.width + x);
          V dot = load(sum + k * W);
          for (int d = 0; d < a.D; d += W) {
            int w = lesser(W, a.D - d);
            dot = fma(load_n(g + d, w), load_n(p + d, w), dot);
          }
          store(sum + k * W, dot);
        });
        int64_t y_end = lesser(a.height, (row + 1) * a.f), x_end = lesser(a.width, (column + 1) * a.f);
        for (int64_t y = row * a.f; y < y_end; ++y)
          for (int64_t x = column * a.f; x < x_end; ++x) {
            int64_t i_end = y == a.height - 1 ? a.f : y - row * a.f + 1,
                    j_end = x == a.width - 1 ? a.f : x - column * a.f + 1;
            float weight = 0;
            for (int64_t i = y - row * a.f; i < i_end; ++i)
              for (int64_t j = x - column * a.f; j < j_end; ++j) weight += a.weight[i * a.f + j];
            T* out = at<T>(a.grad_x, b, h, y * a.width + x);
            for (int d = 0; d < a.D; d += W) {
              int w = lesser(W, a.D - d);
              store_n(out + d, load_n(g + d, w) * set1(weight), w);
            }
          }
      }
      for (int64_t k = 0; k < weights; ++k) part[task * weights + k] = hsum(load(sum + k * W));
    });
    for (int64_t k = 0; k < weights; ++k) {
      double sum = 0;
      for (int64_t task = 0; task < heads * rows; ++task) sum += static_cast<double>(part[task * weights + k]);
      a.grad_weight[k] = static_cast<float>(sum);
    }
    scratch.drop();
    return true;
  }
};

template <template <class> class X, class Args, class F>
bool with_type(const Args& a, const Parallel& p, const F& f) {
  if (a.dtype == DType::kFloat32) return f(X<float>{a, p});
  if (a.dtype == DType::kFloat16) return f(X<f16>{a, p});
  return f(X<bf16>{a, p});
}

bool forward(const WindowAttentionArgs& a, const Parallel& p) {
  return with_type<Op>(a, p, [](auto op) { return op.run_forward(); });
}
bool backward(const WindowAttentionArgs& a, const Parallel& p) {
  return with_type<Op>(a, p, [](auto op) { return op.run_backward(); });
}
bool pool(const PoolTokensArgs& a, const Parallel& p) {
  return with_type<Pool>(a, p, [](const auto& op) { return op.forward(); });
}
bool pool_backward(const PoolTokensArgs& a, const Parallel& p) {
  return with_type<Pool>(a, p, [](const auto& op) { return op.backward(); });
}

}  // namespace

const WindowAttentionKernels window_attention = {forward, backward, pool, pool_backward};

}  // namespace LINATTN_ISA
}  // namespace linattn
