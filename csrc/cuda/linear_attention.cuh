// Bidirectional linear attention in 16 bits by mma.sync and cp.async (sm_80 and newer): the two kernels.
//
//   state   k, v -> kv, k_sum   one block per (head, split of the tokens, run of value columns). Warp w holds rows
//                               16w .. 16w + 15 of kv in registers (float32) and reads each k and v row once, through
//                               three stages of shared memory. The last block of a head adds up the splits.
//   apply   q, kv -> out        one block per (head, run of tokens, run of value columns). kv, rounded once, stays in
//                               shared memory; every warp goes its own way over tiles of 16 tokens.
//
// Both are bound by memory (D / 2 operations per byte in 16 bits; an H200 does about 180 per byte that it moves), so
// what counts is that every row is read once, that enough copies are under way, and that nothing is written back.
// Per token, D = 64: 256 bytes of global traffic in each kernel; shared memory moves 640 bytes (the second operand is
// read by four warps), 5 clocks of one multiprocessor against 13 that the device's memory needs.
//
// phi is evaluated in float32 on the fragments and rounded to the input type; k_sum is a product with ones of the very
// values that enter kv, and z a sum over the very values that enter the numerator, so that both ends of the fraction
// share their rounding. kv is brought near 2^14 by a power of two before it is rounded: float16 cannot overflow.
//
// Columns past the head dim are zero in shared memory. phi(0) = 1 there meets rows of kv that are zero (apply), or
// fills rows of kv that are not stored (state); the same holds for rows of v past the last token.
#pragma once
#include "tile.cuh"

namespace linattn::cuda {

// phi of a pair of values, rounded to their type. Not a number stays that.
template <class T>
LINATTN_DEVICE uint32_t phi_relu(uint32_t pair) {
  const float low = low_half<T>(pair), high = high_half<T>(pair);
  return pack<T>(low < 0 ? 0.f : low, high < 0 ? 0.f : high);
}
LINATTN_DEVICE float elu1(float t) { return t > 0 ? t + 1 : exp2_fast(t * 1.4426950408889634f); }
template <class T>
LINATTN_DEVICE uint32_t phi_elu1(uint32_t pair) {
  return pack<T>(elu1(low_half<T>(pair)), elu1(high_half<T>(pair)));
}
template <class T>
LINATTN_DEVICE void phi(uint32_t (&fragment)[4], int feature_map) {
  if (feature_map == kElu1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = phi_elu1<T>(fragment[i]);
  } else if (feature_map == kRelu) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = phi_relu<T>(fragment[i]);
  }
}

// phi of one value in float32.
LINATTN_DEVICE float phi_value(float t, int feature_map) {
  if (feature_map == kElu1) return elu1(t);
  return feature_map == kRelu && t < 0 ? 0.f : t;
}

// ---- state ----------------------------------------------------------------------------------------------------------

// What the backward pass of `apply` leaves for each token, and `state` reads there: the factors of phi(q) in the
// gradients of kv and of k_sum (linear_attention_backward.cuh).
struct Weights {
  float of_kv, of_sum;
};
// Tokens of a head in the array of weights: rows begin at multiples of 16 bytes.
LINATTN_HOST_DEVICE inline int64_t weights_stride(int64_t tokens) { return (tokens + 1) / 2 * 2; }

template <class Element>
struct StateParams {
  HeadRows<Element> k, v, k_denom;  // k_denom.data null: absent
  int64_t heads, tokens;
  int64_t chunk;  // tokens per split
  Splits splits;  // one sum for each head and run of value columns
  int D, E, feature_map;
  float *kv, *k_sum;
  // Of weighted sums only:
  const Weights* weights = nullptr;  // (heads of all samples, weights_stride(tokens))
  float kv_factor = 1, sum_factor = 1;
};

// Tiles of D and E columns, which the head dims are padded to.
template <int D, int E>
struct StateTile {
  static constexpr int kThreads = D / 16 * kWarp;
  static constexpr int kRows = D <= 80 ? 64 : 32;  // tokens per stage
  static constexpr int kStages = 3;
  static constexpr int kKeyBytes = kRows * kRowBytes<uint16_t, D>;
  static constexpr int kValueBytes = kRows * kRowBytes<uint16_t, E>;
  static constexpr int kQuads = E / 8 + 1;  // of accumulators per thread: kv, then k_sum
  static constexpr int kHeadBytes = 16;     // in shared memory, before the stages
  static constexpr int kWeightBytes = kRows * static_cast<int>(sizeof(Weights));
  LINATTN_HOST_DEVICE static constexpr int stage_bytes(bool denom, bool weighted = false) {
    return kKeyBytes * (denom ? 2 : 1) + kValueBytes + (weighted ? kWeightBytes : 0);
  }
  LINATTN_HOST_DEVICE static constexpr int shared_bytes(bool denom, bool weighted = false) {
    return kHeadBytes + kStages * stage_bytes(denom, weighted);
  }
};

// Copies the weights of ROWS tokens, the first `live` of which exist; those of the rest become 0.
template <int ROWS, int THREADS>
LINATTN_DEVICE void load_weights(unsigned char* target, const Weights* source, int live) {
  for (int i = thread_index(); i < ROWS / 2; i += THREADS) {
    const int left = live - 2 * i, count = left < 0 ? 0 : left > 2 ? 2 : left;
    copy_async_16(target + i * 16, source + (count ? 2 * i : 0), count * static_cast<int>(sizeof(Weights)));
  }
}

// WEIGHTED: kv = kv_factor sum_j (of_kv_j phi(k_j))^T v_j and k_sum = sum_factor sum_j of_sum_j phi(k_j), the gradients
// of the state with q and the gradient of out in the places of k and v.
template <class T, int D_TILE, int E_TILE, bool WEIGHTED>
LINATTN_KERNEL((StateTile<D_TILE, E_TILE>::kThreads), 1)
state_kernel(StateParams<uint16_t> p) {
  using Tile = StateTile<D_TILE, E_TILE>;
  constexpr uint32_t kOne = is_bfloat16<T> ? 0x3f80 : 0x3c00;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
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

  auto load_stage = [&](int step) {
    unsigned char* stage = stages + step % Tile::kStages * stage_bytes;
    const int64_t token = begin + static_cast<int64_t>(step) * Tile::kRows;
    const int live = end - token < Tile::kRows ? static_cast<int>(end - token) : Tile::kRows;
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

  // [0 .. E_TILE / 8): kv of this warp's 16 rows, 8 columns each; then k_sum, the same in all 8 columns.
  float sums[Tile::kQuads][4];
#pragma unroll
  for (int i = 0; i < Tile::kQuads; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) load_stage(step);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    if (LINATTN_FAULT("state waits for one copy too few")) {
      copy_async_wait<Tile::kStages - 1>();
    } else {
      copy_async_wait<Tile::kStages - 2>();
    }
    // Everybody's copies of this step are visible, and everybody is done with the stage that is refilled next.
    if (!LINATTN_FAULT("no barrier between stages")) barrier_block();
    const int refill = step + Tile::kStages - (LINATTN_FAULT("state refills the stage in use") ? 0 : 1);
    if (refill < steps) load_stage(refill);
    copy_async_commit();

    unsigned char* keys = stages + step % Tile::kStages * stage_bytes;
    unsigned char* values = keys + Tile::kKeyBytes;
    unsigned char* denom_keys = values + Tile::kValueBytes;
    const int64_t rest = end - begin - static_cast<int64_t>(step) * Tile::kRows;
    const int live = rest < Tile::kRows ? static_cast<int>(rest) : Tile::kRows;
#pragma unroll
    for (int token = 0; token < Tile::kRows; token += 16) {
      // phi(k)^T: rows of the tile are the product's columns, hence the transposed load. Its four matrices lie, in
      // tokens and columns of k, at (0, 0), (0, 8), (8, 0) and (8, 8).
      const int row = token + (lane >> 4) * 8 + (lane & 7), chunk = warp * 2 + (lane >> 3 & 1);
      uint32_t left[4];
      load_matrices_transposed(left, chunk_of<uint16_t, D_TILE>(keys, row, chunk));
      if constexpr (WEIGHTED) {
        uint32_t counted[4] = {left[0], left[1], left[2], left[3]};
        if (denom) load_matrices_transposed(counted, chunk_of<uint16_t, D_TILE>(denom_keys, row, chunk));
        // Registers 0 and 1 hold rows lane / 4 and + 8 of tokens 2t and 2t + 1; 2 and 3 the same, 8 tokens on.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int first = token + i / 2 * 8 + (lane & 3) * 2;
          const Quad w = load_quad(keys + weights_at + first * sizeof(Weights));
          const float of_kv[2] = {float_from_bits(w.x[0]), float_from_bits(w.x[2])};
          const float of_sum[2] = {float_from_bits(w.x[1]), float_from_bits(w.x[3])};
          sums[Tile::kQuads - 1][i % 2 * 2] += of_sum[0] * phi_value(low_half<T>(counted[i]), p.feature_map) +
                                               of_sum[1] * phi_value(high_half<T>(counted[i]), p.feature_map);
          left[i] = pack<T>(of_kv[0] * phi_value(low_half<T>(left[i]), p.feature_map),
                            of_kv[1] * phi_value(high_half<T>(left[i]), p.feature_map));
        }
      } else {
        phi<T>(left, p.feature_map);
      }
      if (LINATTN_FAULT("state swaps fragment registers")) {
        const uint32_t other = left[1];
        left[1] = left[2], left[2] = other;
      }
#pragma unroll
      for (int column = 0; column < E_TILE; column += 16) {
        uint32_t right[4];
        load_matrices_transposed(right,
                                 chunk_of<uint16_t, E_TILE>(values, token + (lane & 15), column / 8 + (lane >> 4)));
        multiply_add<T>(sums[column / 8], left, right[0], right[1]);
        multiply_add<T>(sums[column / 8 + 1], left, right[2], right[3]);
      }
      if constexpr (WEIGHTED) continue;
      if (denom) {
        load_matrices_transposed(left, chunk_of<uint16_t, D_TILE>(denom_keys, row, chunk));
        phi<T>(left, p.feature_map);
      }
      // Ones where there is a token: phi of the rows past the last one is not 0.
      const int t = token + (lane & 3) * 2,
                counted = LINATTN_FAULT("k_sum counts rows past the end") ? Tile::kRows : live;
      const uint32_t ones0 = (t < counted ? kOne : 0) | (t + 1 < counted ? kOne << 16 : 0);
      const uint32_t ones1 = (t + 8 < counted ? kOne : 0) | (t + 9 < counted ? kOne << 16 : 0);
      multiply_add<T>(sums[Tile::kQuads - 1], left, ones0, ones1);
    }
  }

  if constexpr (WEIGHTED) {  // each lane of a quad has a quarter of the tokens
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = sums[Tile::kQuads - 1][half * 2];
      sum += shuffle_xor(sum, 1);
      if (!LINATTN_FAULT("half of a row's sum")) sum += shuffle_xor(sum, 2);
    }
  }
  if (p.splits.count > 1) {
    const int64_t index = head * ((p.E + E_TILE - 1) / E_TILE) + block_z();
    if (!reduce_splits<Tile::kThreads>(p.splits, index, split, sums, flag)) return;
  }

  const int limit = p.D + (LINATTN_FAULT("kv is stored past its last row") ? 1 : 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int d = warp * 16 + half * 8 + lane / 4;
    if (d >= limit) continue;
    float* kv_row = p.kv + (head * p.D + d) * p.E + first_column;
#pragma unroll
    for (int i = 0; i < E_TILE / 8; ++i)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int e = i * 8 + lane % 4 * 2 + c;
        if (e < columns) kv_row[e] = WEIGHTED ? sums[i][half * 2 + c] * p.kv_factor : sums[i][half * 2 + c];
      }
    if (lane % 4 == 0 && first_column == 0) {
      const float sum = sums[Tile::kQuads - 1][half * 2];
      // A factor of 0 says that there is no denominator, whatever q holds.
      p.k_sum[head * p.D + d] = !WEIGHTED ? sum : p.sum_factor == 0 ? 0.f : sum * p.sum_factor;
    }
  }
}

// ---- apply ----------------------------------------------------------------------------------------------------------

template <class Element>
struct ApplyParams {
  HeadRows<Element> q, q_denom, out;  // q_denom.data null: absent
  const float *kv, *k_sum;
  int64_t heads, tokens;
  int64_t chunk;  // tokens per block
  int D, E, feature_map;
  bool normalize;
  float scale, inv_count, eps;
};

template <int D, int E>
struct ApplyTile {
  static constexpr int kWarps = D <= 160 ? 4 : 2;  // four warps' queries would not fit beside so large a state
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = 16;  // tokens that a warp takes at a time
  static constexpr int kStages = 2;
  static constexpr int kQueryBytes = kRows * kRowBytes<uint16_t, D>;
  static constexpr int kStateBytes = D * kRowBytes<uint16_t, E>;
  static constexpr int kMeanBytes = D * 4;
  static constexpr int kPeakBytes = 16;  // a float for each of up to four warps; what follows lies at a multiple of 16
  // Columns whose accumulators are in registers at a time.
  static constexpr int kColumns = E % 80 == 0 ? 80 : E % 64 == 0 ? 64 : 48;
  LINATTN_HOST_DEVICE static constexpr int stage_bytes(bool denom) { return kQueryBytes * (denom ? 2 : 1); }
  LINATTN_HOST_DEVICE static constexpr int shared_bytes(bool denom) {
    return kStateBytes + kMeanBytes + kPeakBytes + kWarps * kStages * stage_bytes(denom);
  }
  static_assert(E % kColumns == 0 && E <= D);
};

// Power of two that brings peak into [2^14, 2^15), 1 where peak is 0, subnormal, infinite or not a number. Its inverse
// is normal as well.
LINATTN_DEVICE float fit_of(float peak) {
  const int exponent = static_cast<int>(float_bits(peak) >> 23 & 255);
  int power = 268 - exponent;  // 127 + 14 - (exponent - 127)
  power = power > 253 ? 253 : power;
  return exponent == 0 || exponent == 255 ? 1.f : float_from_bits(static_cast<uint32_t>(power) << 23);
}

// Makes a state resident: the float32 matrix (D rows of E, of which `columns` from its pointer on) brought near 2^14 by
// a power of two, which is returned, and rounded into D_TILE x E_TILE values of shared memory; `vector` (null: zeros)
// times `factor` into `mean`. Whole block; ends with a barrier of the block.
template <class T, int D_TILE, int E_TILE, int WARPS>
LINATTN_DEVICE float prepare_state(const float* matrix, const float* vector, float factor, int D, int E, int columns,
                                   unsigned char* state, float* mean, float* peaks) {
  constexpr int kThreads = WARPS * kWarp;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  float peak = 0;
  for (int i = thread_index(); i < D * columns; i += kThreads) {
    const float x = matrix[static_cast<int64_t>(i / columns) * E + i % columns];
    const float size = x < 0 ? -x : x;
    peak = size > peak ? size : peak;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const float other = shuffle_xor(peak, lanes);
    peak = other > peak ? other : peak;
  }
  if (lane == 0) peaks[warp] = peak;
  for (int d = thread_index(); d < D_TILE; d += kThreads) mean[d] = d < D && vector ? vector[d] * factor : 0.f;
  if (!LINATTN_FAULT("no barrier after the peaks")) barrier_block();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) peak = peaks[w] > peak ? peaks[w] : peak;
  const float fit = fit_of(peak);
  for (int i = thread_index(); i < D_TILE * E_TILE / 2; i += kThreads) {
    const int d = i / (E_TILE / 2), e = i % (E_TILE / 2) * 2;
    const float* at = matrix + static_cast<int64_t>(d) * E + e;
    const float low = d < D && e < columns ? at[0] * fit : 0.f;
    const float high = d < D && e + 1 < columns ? at[1] * fit : 0.f;
    *reinterpret_cast<uint32_t*>(state + d * kRowBytes<uint16_t, E_TILE> + e * 2) = pack<T>(low, high);
  }
  if (!LINATTN_FAULT("no barrier after the state")) barrier_block();
  return fit;
}

template <class T, int D_TILE, int E_TILE>
LINATTN_KERNEL((ApplyTile<D_TILE, E_TILE>::kThreads), 1)
apply_kernel(ApplyParams<uint16_t> p) {
  using Tile = ApplyTile<D_TILE, E_TILE>;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, t = lane % 4;
  const int64_t head = block_x(), b = head / p.heads, h = head % p.heads;
  const int first_column = block_z() * E_TILE;
  const int columns = p.E - first_column < E_TILE ? p.E - first_column : E_TILE;
  const bool denom = p.q_denom.data != nullptr;
  const int stage_bytes = Tile::stage_bytes(denom);
  unsigned char* state = shared_memory();
  float* mean = reinterpret_cast<float*>(state + Tile::kStateBytes);
  float* peaks = mean + D_TILE;
  unsigned char* stages =
      reinterpret_cast<unsigned char*>(peaks) + Tile::kPeakBytes + warp * Tile::kStages * stage_bytes;

  const int64_t begin = block_y() * p.chunk, end = begin + p.chunk < p.tokens ? begin + p.chunk : p.tokens;
  constexpr int kStep = Tile::kWarps * Tile::kRows;
  auto load_stage = [&](int64_t token, int parity) {
    unsigned char* stage = stages + parity * stage_bytes;
    const int live = end - token < Tile::kRows ? static_cast<int>(end - token) : Tile::kRows;
    load_tile<Tile::kRows, D_TILE, kWarp>(stage, p.q.row(b, h, token), p.q.stride_n, p.q.aligned, live, p.D, lane);
    if (denom)
      load_tile<Tile::kRows, D_TILE, kWarp>(stage + Tile::kQueryBytes, p.q_denom.row(b, h, token), p.q_denom.stride_n,
                                            p.q_denom.aligned, live, p.D, lane);
  };
  int64_t token = begin + warp * Tile::kRows;
  if (token < end) load_stage(token, 0);  // under way while the state is prepared
  copy_async_commit();

  const float fit = prepare_state<T, D_TILE, E_TILE, Tile::kWarps>(p.kv + head * p.D * p.E + first_column,
                                                                   p.normalize ? p.k_sum + head * p.D : nullptr,
                                                                   p.inv_count, p.D, p.E, columns, state, mean, peaks);
  const float factor = p.scale * (1 / fit);

  // ---- tiles of 16 tokens. Nothing below is shared between warps.
  for (int parity = 0; token < end; token += kStep, parity ^= 1) {
    if (token + kStep < end) load_stage(token + kStep, parity ^ 1);
    copy_async_commit();
    if (LINATTN_FAULT("apply waits for one copy too few")) {
      copy_async_wait<2>();
    } else {
      copy_async_wait<1>();
    }
    if (!LINATTN_FAULT("no barrier after the queries")) barrier_warp();  // the other lanes' copies are visible
    unsigned char* queries = stages + parity * stage_bytes;
    const int live = end - token < Tile::kRows ? static_cast<int>(end - token) : Tile::kRows;

    uint32_t left[D_TILE / 16][4];
#pragma unroll
    for (int k = 0; k < D_TILE / 16; ++k) {
      load_matrices(left[k], chunk_of<uint16_t, D_TILE>(queries, lane & 15, k * 2 + (lane >> 4)));
      phi<T>(left[k], p.feature_map);
    }

    // z of rows lane / 4 and lane / 4 + 8: each lane of a quad has a quarter of the columns.
    float factors[2] = {factor, factor};
    if (p.normalize) {
      float z[2] = {0, 0};
#pragma unroll
      for (int k = 0; k < D_TILE / 16; ++k) {
        uint32_t keys[4] = {left[k][0], left[k][1], left[k][2], left[k][3]};
        if (denom) {
          load_matrices(keys, chunk_of<uint16_t, D_TILE>(queries + Tile::kQueryBytes, lane & 15, k * 2 + (lane >> 4)));
          phi<T>(keys, p.feature_map);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* m = mean + k * 16 + i / 2 * 8 + t * 2;
          z[i % 2] += low_half<T>(keys[i]) * m[0] + high_half<T>(keys[i]) * m[1];
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        z[half] += shuffle_xor(z[half], 1);
        if (!LINATTN_FAULT("half of a row's denominator")) z[half] += shuffle_xor(z[half], 2);
        factors[half] = factor / (z[half] + p.eps);
      }
    }
    // All lanes have read their rows: the tile's memory takes the result, so that it leaves in rows of 16 bytes.
    if (!LINATTN_FAULT("no barrier before the result")) barrier_warp();
#pragma unroll
    for (int run = 0; run < E_TILE; run += Tile::kColumns) {
      float sums[Tile::kColumns / 8][4];
#pragma unroll
      for (int i = 0; i < Tile::kColumns / 8; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
#pragma unroll
      for (int k = 0; k < D_TILE / 16; ++k)
#pragma unroll
        for (int column = 0; column < Tile::kColumns; column += 16) {
          uint32_t right[4];
          load_matrices_transposed(
              right, chunk_of<uint16_t, E_TILE>(state, k * 16 + (lane & 15), (run + column) / 8 + (lane >> 4)));
          multiply_add<T>(sums[column / 8], left[k], right[0], right[1]);
          multiply_add<T>(sums[column / 8 + 1], left[k], right[2], right[3]);
        }
#pragma unroll
      for (int i = 0; i < Tile::kColumns / 8; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(chunk_of<uint16_t, D_TILE>(queries, lane / 4 + half * 8, run / 8 + i) + t * 4) =
              pack<T>(sums[i][half * 2] * factors[half], sums[i][half * 2 + 1] * factors[half]);
    }
    if (!LINATTN_FAULT("no barrier after the result")) barrier_warp();
    store_tile<Tile::kRows, D_TILE, E_TILE>(queries, p.out.row(b, h, token) + first_column, p.out.stride_n,
                                            p.out.aligned, live, columns, lane);
    if (!LINATTN_FAULT("no barrier before the refill")) barrier_warp();  // the tile's memory may be refilled
  }
}

}  // namespace linattn::cuda
