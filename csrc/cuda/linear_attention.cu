// Bidirectional linear attention on a GPU: which tile, how many splits, and the launches.
#include "linear_attention.cuh"
#include "linear_attention.h"
#include "linear_attention_float32.cuh"
#include "linear_attention_plan.h"

namespace linattn::cuda {
namespace {

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
  static constexpr auto kState = state_kernel<T, D_TILE, E_TILE, false>;
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
  static constexpr auto kState = state_kernel_float32<D_TILE, E_TILE, false>;
  static constexpr auto kApply = apply_kernel_float32<D_TILE, E_TILE>;
};

}  // namespace

int64_t linear_attention_workspace(const LinearAttentionArgs& a) {
  if (refusal(a) || a.B * a.H == 0) return 0;
  return with_kernels<Kernels>(a, [&]<class K>(K) { return plan_state<K>(a, a.M).workspace_bytes; });
}

const char* linear_attention_state(const LinearAttentionArgs& a, void* stream_pointer) {
  if (const char* why = refusal(a)) return why;
  if (a.B * a.H == 0) return nullptr;
  const Stream stream = static_cast<Stream>(stream_pointer);
  return with_kernels<Kernels>(a, [&]<class K>(K) -> const char* {
    const Plan plan = plan_state<K>(a, a.M);
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
  return with_kernels<Kernels>(a, [&]<class K>(K) -> const char* {
    const int64_t column_runs = ceil_div(a.E, K::kColumns), blocks = a.B * a.H * column_runs;
    const Runs runs = plan_rows(a.N, K::kStep, blocks, a.multiprocessors);
    if (runs.count > 65535) return "linear attention in CUDA C++ takes fewer queries";
    ApplyParams<typename K::Element> p;
    p.q = decltype(p.q)(a.q), p.out = decltype(p.out)(a.out);
    p.q_denom = decltype(p.q_denom)(a.normalize ? a.q_denom : View{});
    p.kv = a.kv, p.k_sum = a.k_sum, p.heads = a.H, p.tokens = a.N, p.chunk = runs.chunk;
    p.D = a.D, p.E = a.E, p.feature_map = a.feature_map, p.normalize = a.normalize;
    p.scale = a.scale, p.inv_count = a.inv_count, p.eps = a.eps;
    return launch(K::kApply, {a.B * a.H, runs.count, column_runs}, K::Apply::kThreads,
                  K::Apply::shared_bytes(p.q_denom.data != nullptr), static_cast<Stream>(stream_pointer), p);
  });
}

}  // namespace linattn::cuda
