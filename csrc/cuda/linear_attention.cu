// Bidirectional linear attention on a GPU: which tile, how many splits, and the launches.
#include <algorithm>

#include "linear_attention.cuh"
#include "linear_attention.h"
#include "linear_attention_float32.cuh"

namespace linattn::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One choice of kernels: element type, tiles of D and E columns, and what they ask of a launch.
template <class T, int D_TILE, int E_TILE>
struct Kernels {
  using Element = uint16_t;
  using State = StateTile<D_TILE, E_TILE>;
  using Apply = ApplyTile<D_TILE, E_TILE>;
  static constexpr int kColumns = E_TILE;
  static constexpr int kSums = State::kQuads;                 // quads per thread of a partial state
  static constexpr int kStep = Apply::kWarps * Apply::kRows;  // tokens that a block of apply takes at a time
  static constexpr int64_t kLongestSum = 16384;               // tokens, beyond which float32 begins to lose bits
  static constexpr auto kState = state_kernel<T, D_TILE, E_TILE>;
  static constexpr auto kApply = apply_kernel<T, D_TILE, E_TILE>;
};
template <int D_TILE, int E_TILE>
struct Kernels<float, D_TILE, E_TILE> {
  using Element = float;
  using State = StateTileFloat32<D_TILE, E_TILE>;
  using Apply = ApplyTileFloat32<D_TILE, E_TILE>;
  static constexpr int kColumns = E_TILE;
  static constexpr int kSums = State::kSums;
  static constexpr int kStep = Apply::kRows;
  static constexpr int64_t kLongestSum = 2048;  // one register per value: no tensor core that sums 16 products at once
  static constexpr auto kState = state_kernel_float32<D_TILE, E_TILE>;
  static constexpr auto kApply = apply_kernel_float32<D_TILE, E_TILE>;
};

// Calls f(Kernels) with the smallest tile that holds both head dims. More than 128 columns of v are taken in several
// runs where registers or shared memory do not suffice.
template <class T, class F>
auto with_tile(int width, F f) {
  constexpr bool kWide = sizeof(typename Kernels<T, 64, 64>::Element) == 4;
  if (width <= 48) return f(Kernels<T, 48, 48>());
  if (width <= 64) return f(Kernels<T, 64, 64>());
  if (width <= 80) return f(Kernels<T, 80, 80>());
  if (width <= 128) return f(Kernels<T, 128, kWide ? 64 : 128>());
  if (width <= 160) return f(Kernels<T, 160, kWide ? 80 : 160>());
  return f(Kernels<T, 256, kWide ? 64 : 128>());
}
template <class F>
auto with_kernels(const LinearAttentionArgs& a, F f) {
  const int width = std::max(a.D, a.E);
  if (a.dtype == DType::kFloat32) return with_tile<float>(width, f);
  return a.dtype == DType::kBFloat16 ? with_tile<BFloat16>(width, f) : with_tile<Float16>(width, f);
}

struct Plan {
  int64_t column_runs, splits, chunk, group;
  int64_t ticket_bytes = 0, workspace_bytes = 0;
};
// Never a function of the batch: the split decides the order of the sums, and a sample must give the same bits in any
// batch. Two blocks per multiprocessor at batch 1, but not less than 256 tokens for each.
template <class K>
Plan plan_state(const LinearAttentionArgs& a) {
  Plan p;
  p.column_runs = ceil_div(a.E, K::kColumns);
  const int64_t fill = std::min(ceil_div(2 * static_cast<int64_t>(a.multiprocessors), a.H * p.column_runs), a.M / 256);
  const int64_t splits = std::max({int64_t{1}, fill, ceil_div(a.M, K::kLongestSum)});
  p.chunk = ceil_div(ceil_div(a.M, splits), 64) * 64;
  p.splits = ceil_div(a.M, p.chunk);
  p.group = 1;
  while (p.group * p.group < p.splits) ++p.group;
  if (p.splits > 1) {
    const int64_t sums = a.B * a.H * p.column_runs;
    p.ticket_bytes = ceil_div(sums * (1 + ceil_div(p.splits, p.group)) * 4, 256) * 256;
    p.workspace_bytes = p.ticket_bytes + sums * p.splits * K::kSums * K::State::kThreads * 16;
  }
  return p;
}

const char* refusal(const LinearAttentionArgs& a) {
  if (a.D < 1 || a.D > 256 || a.E < 1 || a.E > 256) return "linear attention in CUDA C++ takes head dims 1..256";
  if (a.B * a.H >= int64_t{1} << 31) return "linear attention in CUDA C++ takes fewer than 2^31 heads of all samples";
  return nullptr;
}

}  // namespace

int64_t linear_attention_workspace(const LinearAttentionArgs& a) {
  if (refusal(a) || a.B * a.H == 0) return 0;
  return with_kernels(a, [&]<class K>(K) { return plan_state<K>(a).workspace_bytes; });
}

const char* linear_attention_state(const LinearAttentionArgs& a, void* stream_pointer) {
  if (const char* why = refusal(a)) return why;
  if (a.B * a.H == 0) return nullptr;
  const Stream stream = static_cast<Stream>(stream_pointer);
  return with_kernels(a, [&]<class K>(K) -> const char* {
    const Plan plan = plan_state<K>(a);
    if (plan.splits > 65535) return "linear attention in CUDA C++ takes fewer keys";
    StateParams<typename K::Element> p;
    p.k = decltype(p.k)(a.k), p.v = decltype(p.v)(a.v), p.k_denom = decltype(p.k_denom)(a.k_denom);
    p.heads = a.H, p.tokens = a.M, p.chunk = plan.chunk;
    p.splits = {static_cast<int>(plan.splits), static_cast<int>(plan.group),
                static_cast<unsigned char*>(a.workspace) + plan.ticket_bytes, static_cast<int*>(a.workspace)};
    p.D = a.D, p.E = a.E, p.feature_map = a.feature_map, p.kv = a.kv, p.k_sum = a.k_sum;
    if (plan.ticket_bytes)
      if (const char* error = fill_zero(a.workspace, plan.ticket_bytes, stream)) return error;
    return launch(K::kState, {a.B * a.H, plan.splits, plan.column_runs}, K::State::kThreads,
                  K::State::shared_bytes(a.k_denom.data != nullptr), stream, p);
  });
}

const char* linear_attention_apply(const LinearAttentionArgs& a, void* stream_pointer) {
  if (const char* why = refusal(a)) return why;
  if (a.B * a.H * a.N == 0) return nullptr;
  return with_kernels(a, [&]<class K>(K) -> const char* {
    const int64_t column_runs = ceil_div(a.E, K::kColumns), blocks = a.B * a.H * column_runs;
    // Long runs spread the cost of preparing the state, short ones fill the device. Rows are independent of each other,
    // so the batch may count.
    const int64_t fill = ceil_div(2 * static_cast<int64_t>(a.multiprocessors), blocks);
    const int64_t smooth =
        std::min(ceil_div(8 * static_cast<int64_t>(a.multiprocessors), blocks), a.N / (8 * K::kStep));
    const int64_t wanted = std::max({int64_t{1}, fill, smooth, ceil_div(a.N, 65536)});
    const int64_t chunk = ceil_div(ceil_div(a.N, wanted), K::kStep) * K::kStep, runs = ceil_div(a.N, chunk);
    if (runs > 65535) return "linear attention in CUDA C++ takes fewer queries";
    ApplyParams<typename K::Element> p;
    p.q = decltype(p.q)(a.q), p.out = decltype(p.out)(a.out);
    p.q_denom = decltype(p.q_denom)(a.normalize ? a.q_denom : View{});
    p.kv = a.kv, p.k_sum = a.k_sum, p.heads = a.H, p.tokens = a.N, p.chunk = chunk;
    p.D = a.D, p.E = a.E, p.feature_map = a.feature_map, p.normalize = a.normalize;
    p.scale = a.scale, p.inv_count = a.inv_count, p.eps = a.eps;
    return launch(K::kApply, {a.B * a.H, runs, column_runs}, K::Apply::kThreads,
                  K::Apply::shared_bytes(p.q_denom.data != nullptr), static_cast<Stream>(stream_pointer), p);
  });
}

}  // namespace linattn::cuda
