// The backward pass of linear attention in 16 bits by mma.sync and cp.async (sm_80 and newer). Formulas:
// docs/linear_attention.md, "Gradients". With g the gradient of out, S = kv, m = inv_count k_sum:
//
//   rows, apply's    g, q, S, m -> dq [dq_denom], weights    dq_i = (w_i / z_i + r_i m) phi'(q_i)
//                    with w_i = scale S g_i and r_i = -(phi(q_i) . w_i) / z_i^2
//   state, weighted  q, g, weights -> dkv, dk_sum            dkv = scale sum_i (phi(q_i) / z_i)^T g_i,
//                                                            dk_sum = inv_count sum_i r_i phi(q_i)
//   rows, state's    v, k, dkv, dk_sum -> dk, dv [dk_denom]  dk_j = (dkv v_j + dk_sum) phi'(k_j), dv_j = phi(k_j) dkv
//
// The first and the third are one kernel: rows of x (g, v) times a matrix transposed, then an elementwise end with rows
// of y (q, k). One block per (head, run of tokens); the matrix, rounded once, stays in shared memory, is read along its
// rows for the first product and transposed for dv, and every warp goes its own way over tiles of 16 tokens, all of
// whose D columns it holds as accumulators: r needs a whole row before dq can be written. The second is the forward's
// state kernel with weights, 1 / z_i and r_i of every token, 8 bytes each, which the first left; so its sums over
// splits and their order are the forward's.
//
// Per token, D = E: 7 D values must move (g, q, dq; k, v, dk, dv). Here it is 9 D values and 16 bytes, because q and g
// are read twice: bytes are what bounds this as well, at 8 D^2 operations (docs/cuda.md).
#pragma once
#include "linear_attention.cuh"

namespace linattn::cuda {

// phi'(t) from t and phi(t).
LINATTN_DEVICE float phi_slope(float t, float p, int feature_map) {
  if (feature_map == kElu1) return t > 0 ? 1.f : p;
  return feature_map == kRelu ? (t > 0 ? 1.f : 0.f) : 1.f;
}

template <class Element>
struct RowsParams {
  HeadRows<Element> x, y, y_denom;                 // y_denom.data null: absent
  HeadRows<Element> grad_x, grad_y, grad_y_denom;  // grad_x: of state's backward only
  const float *matrix, *vector;                    // kv and k_sum, or their gradients
  Weights* weights;                                // of apply's backward only: (heads of all samples, weights_stride)
  int64_t heads, tokens;
  int64_t chunk;  // tokens per block
  int D, E, feature_map;
  bool normalize;
  float scale, inv_count, eps;
};

template <int WIDTH>
struct RowsTile {
  // Above 160 columns so little is left beside the matrix that x and y of a warp take turns in one tile.
  static constexpr bool kTurns = WIDTH > 160;
  static constexpr int kWarps = kTurns ? 3 : WIDTH == 80 ? 6 : 8;  // 80: so that two blocks' registers fit
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBlocks = WIDTH <= 80 ? 2 : 1;  // per multiprocessor, as far as registers go
  static constexpr int kRows = 16;                     // tokens that a warp takes at a time
  static constexpr int kTileBytes = kRows * kRowBytes<uint16_t, WIDTH>;
  static constexpr int kStateBytes = WIDTH * kRowBytes<uint16_t, WIDTH>;
  static constexpr int kMeanBytes = WIDTH * 4;
  static constexpr int kPeakBytes = 32;  // a float for each of up to eight warps
  static constexpr int kColumns = WIDTH % 80 == 0 ? 80 : WIDTH % 64 == 0 ? 64 : 48;  // of dv at a time
  // Of the steps of x S^T: above 80 columns one has work enough to hide its loads, and more cost registers.
  static constexpr int kUnroll = WIDTH <= 80 ? WIDTH / 16 : 1;
  static constexpr int kBytes = kStateBytes + kMeanBytes + kPeakBytes + kWarps * kTileBytes * (kTurns ? 1 : 2);
};

// KEYS: state's backward; else apply's.
template <class T, int WIDTH, bool KEYS>
LINATTN_KERNEL((RowsTile<WIDTH>::kThreads), (RowsTile<WIDTH>::kBlocks))
rows_kernel(RowsParams<uint16_t> p) {
  using Tile = RowsTile<WIDTH>;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, t = lane % 4;
  const int64_t head = block_x(), b = head / p.heads, h = head % p.heads;
  const bool denom = p.y_denom.data != nullptr, divide = !KEYS && p.normalize;
  unsigned char* state = shared_memory();
  float* mean = reinterpret_cast<float*>(state + Tile::kStateBytes);
  float* peaks = mean + WIDTH;
  unsigned char* x_tile =
      reinterpret_cast<unsigned char*>(peaks) + Tile::kPeakBytes + warp * Tile::kTileBytes * (Tile::kTurns ? 1 : 2);
  unsigned char* y_tile = x_tile + (Tile::kTurns ? 0 : Tile::kTileBytes);

  const float fit = prepare_state<T, WIDTH, WIDTH, Tile::kWarps>(
      p.matrix + head * p.D * p.E, KEYS || p.normalize ? p.vector + head * p.D : nullptr, KEYS ? 1.f : p.inv_count, p.D,
      p.E, p.E, state, mean, peaks);
  const float factor = p.scale * (1 / fit);

  const int64_t begin = block_y() * p.chunk, end = begin + p.chunk < p.tokens ? begin + p.chunk : p.tokens;
  constexpr int kStep = Tile::kWarps * Tile::kRows;
  // Nothing below is shared between warps.
  for (int64_t token = begin + warp * Tile::kRows; token < end; token += kStep) {
    const int live = end - token < Tile::kRows ? static_cast<int>(end - token) : Tile::kRows;
    auto load_y = [&] {
      load_tile<Tile::kRows, WIDTH, kWarp>(y_tile, p.y.row(b, h, token), p.y.stride_n, p.y.aligned, live, p.D, lane);
      copy_async_commit();
    };
    load_tile<Tile::kRows, WIDTH, kWarp>(x_tile, p.x.row(b, h, token), p.x.stride_n, p.x.aligned, live, p.E, lane);
    copy_async_commit();
    if constexpr (!Tile::kTurns) load_y();
    if (Tile::kTurns || !LINATTN_FAULT("rows wait for one copy too few")) {
      copy_async_wait<0>();
    } else {
      copy_async_wait<1>();
    }
    if (!LINATTN_FAULT("no barrier after the rows")) barrier_warp();  // the other lanes' copies are visible

    // ---- x S^T: rows of S are the product's columns, as the plain load has them. Its four matrices lie, in rows and
    // columns of S, at (0, 0), (0, 8), (8, 0) and (8, 8).
    float sums[WIDTH / 8][4];
#pragma unroll
    for (int i = 0; i < WIDTH / 8; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
#pragma unroll(Tile::kUnroll)
    for (int k = 0; k < WIDTH / 16; ++k) {
      uint32_t left[4];
      load_matrices(left, chunk_of<uint16_t, WIDTH>(x_tile, lane & 15, k * 2 + (lane >> 4)));
#pragma unroll
      for (int n = 0; n < WIDTH / 16; ++n) {
        uint32_t right[4];
        load_matrices(right,
                      chunk_of<uint16_t, WIDTH>(state, n * 16 + (lane >> 4) * 8 + (lane & 7), k * 2 + (lane >> 3 & 1)));
        if (LINATTN_FAULT("rows swap fragment registers")) {
          const uint32_t other = right[1];
          right[1] = right[2], right[2] = other;
        }
        multiply_add<T>(sums[n * 2], left, right[0], right[1]);
        multiply_add<T>(sums[n * 2 + 1], left, right[2], right[3]);
      }
    }
    // All lanes have read their x: its tile takes the results, so that they leave in rows of 16 bytes.
    if (!LINATTN_FAULT("no barrier after the product")) barrier_warp();
    if constexpr (Tile::kTurns) {
      load_y();
      copy_async_wait<0>();
      if (!LINATTN_FAULT("no barrier after the second rows")) barrier_warp();
    }

    // ---- the end of each row. A fragment of y has the layout of two accumulators: registers 0 and 2 are row lane / 4
    // of sums 2k and 2k + 1, registers 1 and 3 row lane / 4 + 8.
    // A value of y_denom, which is rarely there and goes without shared memory.
    auto denom_at = [&](int half, int d) {
      const int row = lane / 4 + half * 8;
      return row < live && d < p.D ? low_half<T>(p.y_denom.row(b, h, token + row)[d]) : 0.f;
    };
    float inv_z[2] = {1, 1}, r[2] = {KEYS ? 1.f : 0.f, KEYS ? 1.f : 0.f};
    if (divide) {
      float z[2] = {0, 0}, dot[2] = {0, 0};
#pragma unroll
      for (int k = 0; k < WIDTH / 16; ++k) {
        uint32_t y[4];
        load_matrices(y, chunk_of<uint16_t, WIDTH>(y_tile, lane & 15, k * 2 + (lane >> 4)));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* m = mean + k * 16 + i / 2 * 8 + t * 2;
          const float (&s)[4] = sums[k * 2 + i / 2];
          const float low = phi_value(low_half<T>(y[i]), p.feature_map);
          const float high = phi_value(high_half<T>(y[i]), p.feature_map);
          dot[i % 2] += low * s[i % 2 * 2] + high * s[i % 2 * 2 + 1];
          if (!denom) z[i % 2] += low * m[0] + high * m[1];
        }
      }
      if (denom)
        for (int column = t * 2; column < p.D; column += 8)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            z[i % 2] += phi_value(denom_at(i % 2, column + i / 2), p.feature_map) * mean[column + i / 2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        z[half] += shuffle_xor(z[half], 1);
        z[half] += shuffle_xor(z[half], 2);
        dot[half] += shuffle_xor(dot[half], 1);
        if (!LINATTN_FAULT("half of a row's product")) dot[half] += shuffle_xor(dot[half], 2);
        inv_z[half] = 1 / (z[half] + p.eps);
        r[half] = -(dot[half] * factor) * inv_z[half] * inv_z[half];
      }
    }
    if constexpr (!KEYS) {
      const int limit = live + (LINATTN_FAULT("a weight past the last is stored") ? 1 : 0);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (t == 0 && lane / 4 + half * 8 < limit)
          p.weights[head * weights_stride(p.tokens) + token + lane / 4 + half * 8] = {inv_z[half], r[half]};
    }
    uint32_t features[KEYS ? WIDTH / 16 : 1][4];  // phi(y), for dv
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k) {
      uint32_t y[4];
      load_matrices(y, chunk_of<uint16_t, WIDTH>(y_tile, lane & 15, k * 2 + (lane >> 4)));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* m = mean + k * 16 + i / 2 * 8 + t * 2;
        float (&s)[4] = sums[k * 2 + i / 2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float value = c ? high_half<T>(y[i]) : low_half<T>(y[i]);
          const float slope = phi_slope(value, phi_value(value, p.feature_map), p.feature_map);
          float& sum = s[i % 2 * 2 + c];
          sum = sum * factor * inv_z[i % 2];
          if (!denom && (KEYS || divide)) sum += r[i % 2] * m[c];
          sum *= slope;
        }
      }
      if constexpr (KEYS) {
        phi<T>(y, p.feature_map);
#pragma unroll
        for (int i = 0; i < 4; ++i) features[k][i] = y[i];
      }
    }
    if (denom) {
      for (int column = t * 2; column < p.D; column += 8)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int row = lane / 4 + half * 8;
            if (row >= live || column + c >= p.D) continue;
            const float value = denom_at(half, column + c);
            const float slope = phi_slope(value, phi_value(value, p.feature_map), p.feature_map);
            const float gradient = KEYS || divide ? r[half] * mean[column + c] * slope : 0.f;
            p.grad_y_denom.row(b, h, token + row)[column + c] = static_cast<uint16_t>(pack<T>(gradient, 0.f));
          }
    }
    // The tile is free: where there are two the product's barrier said so, and y's is read to its end.
    if (!LINATTN_FAULT("no barrier before the gradients")) barrier_warp();
#pragma unroll
    for (int i = 0; i < WIDTH / 8; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(chunk_of<uint16_t, WIDTH>(x_tile, lane / 4 + half * 8, i) + t * 4) =
            pack<T>(sums[i][half * 2], sums[i][half * 2 + 1]);
    if (!LINATTN_FAULT("no barrier after the gradients")) barrier_warp();
    store_tile<Tile::kRows, WIDTH, WIDTH>(x_tile, p.grad_y.row(b, h, token), p.grad_y.stride_n, p.grad_y.aligned, live,
                                          p.D, lane);

    if constexpr (KEYS) {
      if (Tile::kTurns && !LINATTN_FAULT("no barrier before the second gradients")) barrier_warp();
#pragma unroll
      for (int run = 0; run < WIDTH; run += Tile::kColumns) {
        float values[Tile::kColumns / 8][4];
#pragma unroll
        for (int i = 0; i < Tile::kColumns / 8; ++i) values[i][0] = values[i][1] = values[i][2] = values[i][3] = 0;
#pragma unroll
        for (int k = 0; k < WIDTH / 16; ++k)
#pragma unroll
          for (int column = 0; column < Tile::kColumns; column += 16) {
            uint32_t right[4];
            load_matrices_transposed(
                right, chunk_of<uint16_t, WIDTH>(state, k * 16 + (lane & 15), (run + column) / 8 + (lane >> 4)));
            multiply_add<T>(values[column / 8], features[k], right[0], right[1]);
            multiply_add<T>(values[column / 8 + 1], features[k], right[2], right[3]);
          }
#pragma unroll
        for (int i = 0; i < Tile::kColumns / 8; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            *reinterpret_cast<uint32_t*>(chunk_of<uint16_t, WIDTH>(y_tile, lane / 4 + half * 8, run / 8 + i) + t * 4) =
                pack<T>(values[i][half * 2] * factor, values[i][half * 2 + 1] * factor);
      }
      barrier_warp();
      store_tile<Tile::kRows, WIDTH, WIDTH>(y_tile, p.grad_x.row(b, h, token), p.grad_x.stride_n, p.grad_x.aligned,
                                            live, p.E, lane);
    }
    // The tiles may be refilled. Lanes refill what they stored, so that this orders nothing today; it costs nothing.
    barrier_warp();
  }
}

}  // namespace linattn::cuda
