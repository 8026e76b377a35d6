// Bidirectional linear attention on a GPU: which tile, how many splits, and the launches.
#include <algorithm>

#include "linear_attention.cuh"
#include "linear_attention.h"

namespace linattn::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f<T, D_TILE, E_TILE>() for the smallest tile that holds both head dims. 256 columns of v are two runs of 128:
// a thread has no registers for more.
template <class T, class F>
auto with_tile(int D, int E, F f) {
  const int width = std::max(D, E);
  if (width <= 48) return f.template operator()<T, 48, 48>();
  if (width <= 64) return f.template operator()<T, 64, 64>();
  if (width <= 80) return f.template operator()<T, 80, 80>();
  if (width <= 128) return f.template operator()<T, 128, 128>();
  if (width <= 160) return f.template operator()<T, 160, 160>();
  return f.template operator()<T, 256, 128>();
}
template <class F>
auto with_tile(const LinearAttentionArgs& a, F f) {
  return a.dtype == DType::kBFloat16 ? with_tile<BFloat16>(a.D, a.E, f) : with_tile<Float16>(a.D, a.E, f);
}

struct Split {
  int64_t splits, chunk, group;
};
// Never a function of the batch: the split decides the order of the sums, and a sample must give the same bits in any
// batch. Two blocks per multiprocessor at batch 1, but not less than 256 tokens for each; and no sum over more than
// 16,384 tokens in one register, where float32 begins to lose bits.
Split split_tokens(const LinearAttentionArgs& a, int column_runs) {
  const int64_t fill = std::min(ceil_div(2 * static_cast<int64_t>(a.multiprocessors), a.H * column_runs), a.M / 256);
  int64_t splits = std::max({int64_t{1}, fill, ceil_div(a.M, 16384)});
  const int64_t chunk = ceil_div(ceil_div(a.M, splits), 64) * 64;
  splits = ceil_div(a.M, chunk);
  int64_t group = 1;
  while (group * group < splits) ++group;
  return {splits, chunk, group};
}

// Where `state` keeps its partial sums.
struct Workspace {
  int64_t ticket_bytes, bytes;
};
template <int D_TILE, int E_TILE>
Workspace workspace(const LinearAttentionArgs& a, const Split& s) {
  const int64_t tiles = a.B * a.H * ceil_div(a.E, E_TILE);
  if (s.splits == 1) return {0, 0};
  const int64_t tickets = ceil_div(tiles * (1 + ceil_div(s.splits, s.group)) * 4, 256) * 256;
  return {tickets, tickets + tiles * s.splits * StateTile<D_TILE, E_TILE>::kPartialBytes};
}

HeadRows rows_of(const View& x) {
  const bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride_b % 8 == 0 && x.stride_h % 8 == 0 &&
                       x.stride_n % 8 == 0;
  return {static_cast<uint16_t*>(x.data), x.stride_b, x.stride_h, x.stride_n, aligned};
}

const char* refusal(const LinearAttentionArgs& a) {
  if (a.dtype == DType::kFloat32) return "linear attention in CUDA C++ takes float16 and bfloat16";
  if (a.D < 1 || a.D > 256 || a.E < 1 || a.E > 256) return "linear attention in CUDA C++ takes head dims 1..256";
  if (a.B * a.H >= int64_t{1} << 31) return "linear attention in CUDA C++ takes fewer than 2^31 heads of all samples";
  return nullptr;
}

}  // namespace

int64_t linear_attention_workspace(const LinearAttentionArgs& a) {
  if (refusal(a)) return 0;
  return with_tile(a, [&]<class T, int D_TILE, int E_TILE>() {
    return workspace<D_TILE, E_TILE>(a, split_tokens(a, static_cast<int>(ceil_div(a.E, E_TILE)))).bytes;
  });
}

const char* linear_attention_state(const LinearAttentionArgs& a, void* stream) {
  if (const char* why = refusal(a)) return why;
  if (a.B * a.H == 0) return nullptr;
  return with_tile(a, [&]<class T, int D_TILE, int E_TILE>() -> const char* {
    using Tile = StateTile<D_TILE, E_TILE>;
    const int64_t column_runs = ceil_div(a.E, E_TILE);
    const Split s = split_tokens(a, static_cast<int>(column_runs));
    if (s.splits > 65535) return "linear attention in CUDA C++ takes fewer keys";
    const Workspace w = workspace<D_TILE, E_TILE>(a, s);
    StateParams p{};
    p.k = rows_of(a.k), p.v = rows_of(a.v), p.k_denom = rows_of(a.k_denom);
    p.heads = a.H, p.tokens = a.M, p.chunk = s.chunk;
    p.splits = static_cast<int>(s.splits), p.group = static_cast<int>(s.group);
    p.D = a.D, p.E = a.E, p.feature_map = a.feature_map, p.kv = a.kv, p.k_sum = a.k_sum;
    p.tickets = static_cast<int*>(a.workspace);
    p.partials = static_cast<unsigned char*>(a.workspace) + w.ticket_bytes;
    if (w.bytes)
      if (const char* error = fill_zero(a.workspace, w.ticket_bytes, static_cast<Stream>(stream))) return error;
    return launch(state_kernel<T, D_TILE, E_TILE>, {a.B * a.H, s.splits, column_runs}, Tile::kThreads,
                  Tile::shared_bytes(a.k_denom.data != nullptr), static_cast<Stream>(stream), p);
  });
}

const char* linear_attention_apply(const LinearAttentionArgs& a, void* stream) {
  if (const char* why = refusal(a)) return why;
  if (a.B * a.H * a.N == 0) return nullptr;
  return with_tile(a, [&]<class T, int D_TILE, int E_TILE>() -> const char* {
    using Tile = ApplyTile<D_TILE, E_TILE>;
    const int64_t column_runs = ceil_div(a.E, E_TILE), blocks = a.B * a.H * column_runs;
    constexpr int kStep = Tile::kWarps * Tile::kRows;
    // Long runs spread the cost of preparing the state, short ones fill the device. Rows are independent of each other,
    // so the batch may count.
    const int64_t fill = ceil_div(2 * static_cast<int64_t>(a.multiprocessors), blocks);
    const int64_t smooth = std::min(ceil_div(8 * static_cast<int64_t>(a.multiprocessors), blocks), a.N / (8 * kStep));
    const int64_t wanted = std::max({int64_t{1}, fill, smooth, ceil_div(a.N, 65536)});
    const int64_t chunk = ceil_div(ceil_div(a.N, wanted), kStep) * kStep, runs = ceil_div(a.N, chunk);
    if (runs > 65535) return "linear attention in CUDA C++ takes fewer queries";
    ApplyParams p{};
    p.q = rows_of(a.q), p.q_denom = rows_of(a.normalize ? a.q_denom : View{}), p.out = rows_of(a.out);
    p.kv = a.kv, p.k_sum = a.k_sum, p.heads = a.H, p.tokens = a.N, p.chunk = chunk;
    p.D = a.D, p.E = a.E, p.feature_map = a.feature_map, p.normalize = a.normalize;
    p.scale = a.scale, p.inv_count = a.inv_count, p.eps = a.eps;
    return launch(apply_kernel<T, D_TILE, E_TILE>, {a.B * a.H, runs, column_runs}, Tile::kThreads,
                  Tile::shared_bytes(p.q_denom.data != nullptr), static_cast<Stream>(stream), p);
  });
}

}  // namespace linattn::cuda
