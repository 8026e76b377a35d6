// The backward pass of linear attention in float32, by plain multiply-adds: no TF32, as everywhere in this package.
//
// The data flow of linear_attention_backward.cuh, but dv is the forward's apply kernel with k in the place of q, so k
// is read twice. From D = 80 on this is bound by arithmetic (8 D^2 operations for 40 D bytes per token).
//
// A thread has 4 tokens by WIDTH / 16 or / 32 columns of x S^T; neighbouring threads have neighbouring columns, so that
// rows of y are read, and gradients written, from and to global memory as they lie, and a row's products meet in one
// warp. Rows of S are read 16 bytes at a time by eight threads with eight different rows: no bank is asked twice. Above
// 160 columns S goes through shared memory by 64 columns at a time, once per 32 tokens, from the second cache level:
// 256 KiB for 4.2 million multiply-adds.
#pragma once
#include "linear_attention_backward.cuh"
#include "linear_attention_float32.cuh"

namespace linattn::cuda {

template <int WIDTH>
struct RowsTileFloat32 {
  static constexpr int kAcross = WIDTH <= 80 ? 16 : 32;
  static constexpr int kColumns = WIDTH / kAcross;  // per thread: across, across + kAcross, ...
  static constexpr int kRows = 32;                  // tokens at a time, 4 per thread
  static constexpr int kThreads = kAcross * (kRows / 4);
  static constexpr int kPiece = WIDTH <= 160 ? WIDTH : 64;  // columns of S in shared memory
  static constexpr int kStateBytes = WIDTH * kRowBytes<float, kPiece>;
  static constexpr int kMeanBytes = WIDTH * 4;
  static constexpr int kBytes = kStateBytes + kMeanBytes + kRows * kRowBytes<float, kPiece>;
  static_assert(WIDTH % kAcross == 0 && WIDTH % kPiece == 0);
};

template <int WIDTH, bool KEYS>
LINATTN_KERNEL((RowsTileFloat32<WIDTH>::kThreads), 1)
rows_kernel_float32(RowsParams<float> p) {
  using Tile = RowsTileFloat32<WIDTH>;
  const int across = thread_index() % Tile::kAcross, down = thread_index() / Tile::kAcross;
  const int64_t head = block_x(), b = head / p.heads, h = head % p.heads;
  const bool denom = p.y_denom.data != nullptr, divide = !KEYS && p.normalize;
  unsigned char* state = shared_memory();
  float* mean = reinterpret_cast<float*>(state + Tile::kStateBytes);
  unsigned char* x_tile = state + Tile::kStateBytes + Tile::kMeanBytes;
  const int64_t begin = block_y() * p.chunk, end = begin + p.chunk < p.tokens ? begin + p.chunk : p.tokens;
  const float* matrix = p.matrix + head * p.D * p.E;

  for (int d = thread_index(); d < WIDTH; d += Tile::kThreads)
    mean[d] = d < p.D && (KEYS || divide) ? p.vector[head * p.D + d] * (KEYS ? 1.f : p.inv_count) : 0.f;
  for (int64_t token = begin; token < end; token += Tile::kRows) {
    const int live = end - token < Tile::kRows ? static_cast<int>(end - token) : Tile::kRows;
    float sums[4][Tile::kColumns];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) sums[i][j] = 0;
    for (int piece = 0; piece < p.E; piece += Tile::kPiece) {
      if (!LINATTN_FAULT("float32: no barrier before the rows")) barrier_block();  // all are done with the last ones
      if (Tile::kPiece < WIDTH || token == begin)
        for (int i = thread_index(); i < WIDTH * Tile::kPiece; i += Tile::kThreads) {
          const int d = i / Tile::kPiece, e = i % Tile::kPiece;
          *reinterpret_cast<float*>(state + d * kRowBytes<float, Tile::kPiece> + e * 4) =
              d < p.D && piece + e < p.E ? matrix[static_cast<int64_t>(d) * p.E + piece + e] : 0.f;
        }
      load_tile<Tile::kRows, Tile::kPiece, Tile::kThreads>(x_tile, p.x.row(b, h, token) + piece, p.x.stride_n,
                                                           p.x.aligned, live, p.E - piece, thread_index());
      copy_async_commit();
      copy_async_wait<0>();
      if (!LINATTN_FAULT("float32: no barrier after the rows")) barrier_block();
      for (int chunk = 0; chunk < Tile::kPiece / 4; ++chunk) {
        float left[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          to_floats(load_quad(chunk_of<float, Tile::kPiece>(x_tile, down * 4 + i, chunk)), left[i]);
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) {
          float right[4];
          to_floats(load_quad(chunk_of<float, Tile::kPiece>(state, j * Tile::kAcross + across, chunk)), right);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[i][j] += left[i][c] * right[c];
        }
      }
    }

#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = down * 4 + i;
      const bool alive = row < live;
      const int64_t at = token + (alive ? row : 0);
      auto value = [&](const HeadRows<float>& rows, int j) {
        const int d = j * Tile::kAcross + across;
        return alive && d < p.D ? rows.row(b, h, at)[d] : 0.f;
      };
      float inv_z = 1, r = KEYS ? 1 : 0;
      if (divide) {
        float z = 0, dot = 0;
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) {
          const float feature = phi_precise(value(p.y, j), p.feature_map);
          const float counted = denom ? phi_precise(value(p.y_denom, j), p.feature_map) : feature;
          z += counted * mean[j * Tile::kAcross + across];
          dot += feature * sums[i][j];
        }
#pragma unroll
        for (int lanes = Tile::kAcross / 2; lanes > 0; lanes /= 2) {
          z += shuffle_xor(z, lanes);
          if (!LINATTN_FAULT("float32: half of a row's product") || lanes > 1) dot += shuffle_xor(dot, lanes);
        }
        inv_z = 1 / (z + p.eps);
        r = -(dot * p.scale) * inv_z * inv_z;
      }
      if (!alive) continue;
      if (!KEYS && across == 0) p.weights[head * weights_stride(p.tokens) + at] = {inv_z, r};
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) {
        const int d = j * Tile::kAcross + across;
        if (d >= p.D) continue;
        const float y = value(p.y, j), slope = phi_slope(y, phi_precise(y, p.feature_map), p.feature_map);
        float gradient = sums[i][j] * p.scale * inv_z;
        if (!denom && (KEYS || divide)) gradient += r * mean[d];
        p.grad_y.row(b, h, at)[d] = gradient * slope;
        if (denom) {
          const float other = value(p.y_denom, j);
          p.grad_y_denom.row(b, h, at)[d] =
              KEYS || divide ? r * mean[d] * phi_slope(other, phi_precise(other, p.feature_map), p.feature_map) : 0.f;
        }
      }
    }
  }
}

}  // namespace linattn::cuda
