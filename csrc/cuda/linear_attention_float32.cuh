// Bidirectional linear attention in float32, by plain multiply-adds: no TF32, as everywhere in this package.
//
// The same two kernels as in linear_attention.cuh, with the same data flow. A thread of `state` holds 4 x 4 values of
// kv (8 x 8 above D = 80) and reads of every token its columns of phi(k) and of v, 16 bytes at a time; phi is applied
// once per value, in place, by the thread that copied it. A thread of `apply` has 4 tokens by 4 columns of the result.
// Per token, D = 64: 512 bytes of global traffic against 8,192 operations in each kernel: about as many clocks for the
// one as for the other on an H200 (67 TFLOP/s, 4.3 TB/s).
#pragma once
#include "linear_attention.cuh"

namespace linattn::cuda {

LINATTN_DEVICE float phi_precise(float t, int feature_map) {
  if (feature_map == kElu1) return t > 0 ? t + 1 : exp_precise(t);
  return feature_map == kRelu && t < 0 ? 0.f : t;
}

// Applies phi to a tile; rows from `live` on become 0. Every thread takes the chunks that it brought itself (load_tile
// with the same ROWS, WIDTH and THREADS), so it needs no barrier before.
template <int ROWS, int WIDTH, int THREADS>
LINATTN_DEVICE void phi_in_place(unsigned char* tile, int live, int feature_map) {
  for (int i = thread_index(); i < ROWS * (WIDTH / 4); i += THREADS) {
    unsigned char* at = chunk_of<float, WIDTH>(tile, i / (WIDTH / 4), i % (WIDTH / 4));
    Quad values = load_quad(at);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float x = phi_precise(float_from_bits(values.x[c]), feature_map);
      values.x[c] = i / (WIDTH / 4) < live ? float_bits(x) : 0;
    }
    store_quad(at, values);
  }
}

LINATTN_DEVICE void to_floats(const Quad& quad, float* x) {
#pragma unroll
  for (int c = 0; c < 4; ++c) x[c] = float_from_bits(quad.x[c]);
}

template <int D, int E>
struct StateTileFloat32 {
  static constexpr int kQuads = D <= 80 ? 1 : 2;  // of columns per thread and side
  static constexpr int kAcross = E / 4 / kQuads, kDown = D / 4 / kQuads;
  static constexpr int kThreads = kAcross * kDown;
  static constexpr int kRows = D <= 80 ? 32 : 16;  // tokens per stage
  static constexpr int kStages = 3;
  static constexpr int kKeyBytes = kRows * kRowBytes<float, D>;
  static constexpr int kValueBytes = kRows * kRowBytes<float, E>;
  static constexpr int kSums = kQuads * kQuads * 4 + kQuads;  // quads per thread: rows of kv, then k_sum
  static constexpr int kHeadBytes = 16;
  static constexpr int kWeightBytes = kRows * static_cast<int>(sizeof(Weights));
  LINATTN_HOST_DEVICE static constexpr int stage_bytes(bool denom, bool weighted = false) {
    return kKeyBytes * (denom ? 2 : 1) + kValueBytes + (weighted ? kWeightBytes : 0);
  }
  LINATTN_HOST_DEVICE static constexpr int shared_bytes(bool denom, bool weighted = false) {
    return kHeadBytes + kStages * stage_bytes(denom, weighted);
  }
};

template <int D_TILE, int E_TILE, bool WEIGHTED>
LINATTN_KERNEL((StateTileFloat32<D_TILE, E_TILE>::kThreads), 1)
state_kernel_float32(StateParams<float> p) {
  using Tile = StateTileFloat32<D_TILE, E_TILE>;
  const int across = thread_index() % Tile::kAcross, down = thread_index() / Tile::kAcross;
  const int64_t head = block_x(), b = head / p.heads, h = head % p.heads;
  const int split = block_y(), first_column = block_z() * E_TILE;
  const int columns = p.E - first_column < E_TILE ? p.E - first_column : E_TILE;
  const int64_t begin = split * p.chunk, end = begin + p.chunk < p.tokens ? begin + p.chunk : p.tokens;
  const int steps = static_cast<int>((end - begin + Tile::kRows - 1) / Tile::kRows);
  const bool denom = p.k_denom.data != nullptr;
  const int stage_bytes = Tile::stage_bytes(denom, WEIGHTED);
  const int weights_at = stage_bytes - Tile::kWeightBytes;
  int* flag = reinterpret_cast<int*>(shared_memory());
  unsigned char* stages = shared_memory() + Tile::kHeadBytes;

  auto live_rows = [&](int step) {
    const int64_t rest = end - begin - static_cast<int64_t>(step) * Tile::kRows;
    return rest < Tile::kRows ? static_cast<int>(rest) : Tile::kRows;
  };
  auto load_stage = [&](int step) {
    unsigned char* stage = stages + step % Tile::kStages * stage_bytes;
    const int64_t token = begin + static_cast<int64_t>(step) * Tile::kRows;
    const int live = live_rows(step);
    load_tile<Tile::kRows, D_TILE, Tile::kThreads>(stage, p.k.row(b, h, token), p.k.stride_n, p.k.aligned, live, p.D,
                                                   thread_index());
    load_tile<Tile::kRows, E_TILE, Tile::kThreads>(stage + Tile::kKeyBytes, p.v.row(b, h, token) + first_column,
                                                   p.v.stride_n, p.v.aligned, live, columns, thread_index());
    if (denom)
      load_tile<Tile::kRows, D_TILE, Tile::kThreads>(stage + Tile::kKeyBytes + Tile::kValueBytes,
                                                     p.k_denom.row(b, h, token), p.k_denom.stride_n, p.k_denom.aligned,
                                                     live, p.D, thread_index());
    if constexpr (WEIGHTED)
      load_weights<Tile::kRows, Tile::kThreads>(stage + weights_at, p.weights + head * weights_stride(p.tokens) + token,
                                                live);
  };

  // [(i * kQuads + j) * 4 + r]: row r of the i-th quad of rows, j-th quad of columns; then k_sum of the i-th quad.
  float sums[Tile::kSums][4];
#pragma unroll
  for (int i = 0; i < Tile::kSums; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
  float (&k_sum)[Tile::kQuads][4] = *reinterpret_cast<float (*)[Tile::kQuads][4]>(&sums[Tile::kSums - Tile::kQuads]);
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) load_stage(step);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<Tile::kStages - 2>();
    unsigned char* keys = stages + step % Tile::kStages * stage_bytes;
    unsigned char* values = keys + Tile::kKeyBytes;
    unsigned char* denom_keys = denom ? values + Tile::kValueBytes : keys;
    const int live = live_rows(step);
    phi_in_place<Tile::kRows, D_TILE, Tile::kThreads>(keys, live, p.feature_map);
    if (denom) phi_in_place<Tile::kRows, D_TILE, Tile::kThreads>(denom_keys, live, p.feature_map);
    // Everybody's part of this step is visible, and everybody is done with the stage that is refilled next.
    if (!LINATTN_FAULT("float32: no barrier after phi")) barrier_block();
    if (step + Tile::kStages - 1 < steps) load_stage(step + Tile::kStages - 1);
    copy_async_commit();

    for (int first = 0; first < live; first += 8) {
      float few[Tile::kQuads][4];  // tokens of k_sum: sums of sums lose fewer bits
#pragma unroll
      for (int i = 0; i < Tile::kQuads; ++i) few[i][0] = few[i][1] = few[i][2] = few[i][3] = 0;
      for (int row = first; row < first + 8 && row < live; ++row) {
        float left[Tile::kQuads][4], right[Tile::kQuads][4], counted[4];
        Weights weight{1, 1};
        if constexpr (WEIGHTED) weight = reinterpret_cast<const Weights*>(keys + weights_at)[row];
#pragma unroll
        for (int i = 0; i < Tile::kQuads; ++i) {
          to_floats(load_quad(chunk_of<float, D_TILE>(keys, row, i * Tile::kDown + down)), left[i]);
          to_floats(load_quad(chunk_of<float, E_TILE>(values, row, i * Tile::kAcross + across)), right[i]);
        }
#pragma unroll
        for (int i = 0; i < Tile::kQuads; ++i) {
          if (denom) {
            to_floats(load_quad(chunk_of<float, D_TILE>(denom_keys, row, i * Tile::kDown + down)), counted);
          } else {
#pragma unroll
            for (int c = 0; c < 4; ++c) counted[c] = left[i][c];
          }
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            few[i][c] += WEIGHTED ? counted[c] * weight.of_sum : counted[c];
            if constexpr (WEIGHTED) left[i][c] *= weight.of_kv;
          }
#pragma unroll
          for (int j = 0; j < Tile::kQuads; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
              for (int c = 0; c < 4; ++c) sums[(i * Tile::kQuads + j) * 4 + r][c] += left[i][r] * right[j][c];
        }
      }
#pragma unroll
      for (int i = 0; i < Tile::kQuads; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) k_sum[i][c] += few[i][c];
    }
  }

  if (p.splits.count > 1) {
    const int64_t index = head * ((p.E + E_TILE - 1) / E_TILE) + block_z();
    if (!reduce_splits<Tile::kThreads>(p.splits, index, split, sums, flag)) return;
  }
#pragma unroll
  for (int i = 0; i < Tile::kQuads; ++i)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int d = (i * Tile::kDown + down) * 4 + r;
      if (d >= p.D) continue;
      float* kv_row = p.kv + (head * p.D + d) * p.E + first_column;
#pragma unroll
      for (int j = 0; j < Tile::kQuads; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int e = (j * Tile::kAcross + across) * 4 + c;
          const float sum = sums[(i * Tile::kQuads + j) * 4 + r][c];
          if (e < columns) kv_row[e] = WEIGHTED ? sum * p.kv_factor : sum;
        }
      if (across == 0 && first_column == 0)
        p.k_sum[head * p.D + d] = !WEIGHTED ? k_sum[i][r] : p.sum_factor == 0 ? 0.f : k_sum[i][r] * p.sum_factor;
    }
}

template <int D, int E>
struct ApplyTileFloat32 {
  static constexpr int kQuads = E <= 80 ? 1 : 2;  // of columns per thread
  static constexpr int kRows = 32;                // tokens at a time, 4 per thread
  static constexpr int kAcross = E / 4 / kQuads, kThreads = kAcross * (kRows / 4);
  static constexpr int kQueryBytes = kRows * kRowBytes<float, D>;
  static constexpr int kStateBytes = D * kRowBytes<float, E>;
  static constexpr int kMeanBytes = D * 4;
  LINATTN_HOST_DEVICE static constexpr int shared_bytes(bool denom) {
    return kStateBytes + kMeanBytes + kQueryBytes * (denom ? 2 : 1);
  }
};

template <int D_TILE, int E_TILE>
LINATTN_KERNEL((ApplyTileFloat32<D_TILE, E_TILE>::kThreads), 1)
apply_kernel_float32(ApplyParams<float> p) {
  using Tile = ApplyTileFloat32<D_TILE, E_TILE>;
  const int across = thread_index() % Tile::kAcross, down = thread_index() / Tile::kAcross;
  const int64_t head = block_x(), b = head / p.heads, h = head % p.heads;
  const int first_column = block_z() * E_TILE;
  const int columns = p.E - first_column < E_TILE ? p.E - first_column : E_TILE;
  const bool denom = p.q_denom.data != nullptr;
  unsigned char* state = shared_memory();
  float* mean = reinterpret_cast<float*>(state + Tile::kStateBytes);
  unsigned char* queries = state + Tile::kStateBytes + Tile::kMeanBytes;
  unsigned char* denom_queries = denom ? queries + Tile::kQueryBytes : queries;
  const int64_t begin = block_y() * p.chunk, end = begin + p.chunk < p.tokens ? begin + p.chunk : p.tokens;

  const float* kv = p.kv + head * p.D * p.E + first_column;
  for (int i = thread_index(); i < D_TILE * E_TILE; i += Tile::kThreads) {
    const int d = i / E_TILE, e = i % E_TILE;
    *reinterpret_cast<float*>(state + d * kRowBytes<float, E_TILE> + e * 4) =
        d < p.D && e < columns ? kv[static_cast<int64_t>(d) * p.E + e] : 0.f;
  }
  for (int d = thread_index(); d < D_TILE; d += Tile::kThreads)
    mean[d] = d < p.D && p.normalize ? p.k_sum[head * p.D + d] * p.inv_count : 0.f;

  for (int64_t token = begin; token < end; token += Tile::kRows) {
    const int live = end - token < Tile::kRows ? static_cast<int>(end - token) : Tile::kRows;
    if (!LINATTN_FAULT("float32: no barrier before the queries")) barrier_block();  // all are done with the last ones
    load_tile<Tile::kRows, D_TILE, Tile::kThreads>(queries, p.q.row(b, h, token), p.q.stride_n, p.q.aligned, live, p.D,
                                                   thread_index());
    if (denom)
      load_tile<Tile::kRows, D_TILE, Tile::kThreads>(denom_queries, p.q_denom.row(b, h, token), p.q_denom.stride_n,
                                                     p.q_denom.aligned, live, p.D, thread_index());
    copy_async_commit();
    copy_async_wait<0>();
    phi_in_place<Tile::kRows, D_TILE, Tile::kThreads>(queries, live, p.feature_map);
    if (denom) phi_in_place<Tile::kRows, D_TILE, Tile::kThreads>(denom_queries, live, p.feature_map);
    if (!LINATTN_FAULT("float32: no barrier after the queries")) barrier_block();  // the first time the state's as well

    float sums[4][Tile::kQuads][4], z[4][4];  // z in four parts, which lose fewer bits than one
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      z[r][0] = z[r][1] = z[r][2] = z[r][3] = 0;
#pragma unroll
      for (int j = 0; j < Tile::kQuads; ++j) sums[r][j][0] = sums[r][j][1] = sums[r][j][2] = sums[r][j][3] = 0;
    }
    for (int chunk = 0; chunk < D_TILE / 4; ++chunk) {
      float left[4][4], m[4], counted[4];
      to_floats(load_quad(mean + chunk * 4), m);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        to_floats(load_quad(chunk_of<float, D_TILE>(queries, down * 4 + r, chunk)), left[r]);
        to_floats(load_quad(chunk_of<float, D_TILE>(denom_queries, down * 4 + r, chunk)), counted);
#pragma unroll
        for (int c = 0; c < 4; ++c) z[r][c] += counted[c] * m[c];
      }
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < Tile::kQuads; ++j) {
          float right[4];
          to_floats(load_quad(chunk_of<float, E_TILE>(state, chunk * 4 + k, j * Tile::kAcross + across)), right);
#pragma unroll
          for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[r][j][c] += left[r][k] * right[c];
        }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = down * 4 + r;
      if (row >= live) continue;
      const float factor = p.normalize ? p.scale / (z[r][0] + z[r][1] + (z[r][2] + z[r][3]) + p.eps) : p.scale;
#pragma unroll
      for (int j = 0; j < Tile::kQuads; ++j) {
        const int e = (j * Tile::kAcross + across) * 4, count = columns - e;
        float* to = p.out.row(b, h, token + row) + first_column + e;
        const float (&s)[4] = sums[r][j];
        if (p.out.aligned && count >= 4) {
          store_quad(to, {{float_bits(s[0] * factor), float_bits(s[1] * factor), float_bits(s[2] * factor),
                           float_bits(s[3] * factor)}});
        } else {
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (c < count) to[c] = s[c] * factor;
        }
      }
    }
  }
}

}  // namespace linattn::cuda
