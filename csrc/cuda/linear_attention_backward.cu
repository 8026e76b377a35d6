// The backward pass of linear attention on a GPU: the launches.
#include "linear_attention.h"
#include "linear_attention_backward.cuh"
#include "linear_attention_backward_float32.cuh"
#include "linear_attention_plan.h"

namespace linattn::cuda {
namespace {

// One choice of kernels, as in linear_attention.cu.
template <class T, int D_TILE, int E_TILE>
struct BackwardKernels {
  using Element = uint16_t;
  using State = StateTile<D_TILE, E_TILE>;
  using Rows = RowsTile<D_TILE>;
  static constexpr int kColumns = E_TILE;
  static constexpr int kSums = State::kQuads;
  static constexpr int kStep = Rows::kWarps * Rows::kRows;
  static constexpr int64_t kLongestSum = 16384;
  static constexpr auto kState = state_kernel<T, D_TILE, E_TILE, true>;
  static constexpr auto kApplyRows = rows_kernel<T, D_TILE, false>;
  static constexpr auto kStateRows = rows_kernel<T, D_TILE, true>;
};
template <int D_TILE, int E_TILE>
struct BackwardKernels<float, D_TILE, E_TILE> {
  using Element = float;
  using State = StateTileFloat32<D_TILE, E_TILE>;
  using Rows = RowsTileFloat32<D_TILE>;
  static constexpr int kColumns = E_TILE;
  static constexpr int kSums = State::kSums;
  static constexpr int kStep = Rows::kRows;
  static constexpr int64_t kLongestSum = 2048;
  static constexpr auto kState = state_kernel_float32<D_TILE, E_TILE, true>;
  static constexpr auto kApplyRows = rows_kernel_float32<D_TILE, false>;
  static constexpr auto kStateRows = rows_kernel_float32<D_TILE, true>;
};

// Blocks that are half empty, on all multiprocessors, move more than full ones on half of them.
template <class K>
Runs plan_backward_rows(const LinearAttentionArgs& a, int64_t tokens) {
  const int64_t heads = a.B * a.H;
  int64_t step = K::kStep;
  while (step > 32 && step % 32 == 0 && 2 * heads * ceil_div(tokens, step) <= a.multiprocessors) step /= 2;
  return plan_rows(tokens, step, heads, a.multiprocessors);
}

template <class K>
RowsParams<typename K::Element> rows_params(const LinearAttentionArgs& a, const Runs& runs, int64_t tokens) {
  RowsParams<typename K::Element> p;
  p.heads = a.H, p.tokens = tokens, p.chunk = runs.chunk, p.weights = nullptr;
  p.D = a.D, p.E = a.E, p.feature_map = a.feature_map, p.normalize = a.normalize;
  p.scale = a.scale, p.inv_count = a.inv_count, p.eps = a.eps;
  return p;
}

}  // namespace

int64_t linear_attention_apply_backward_workspace(const LinearAttentionArgs& a) {
  if (refusal(a) || a.B * a.H * a.N == 0) return 0;
  const int64_t weights = a.B * a.H * weights_stride(a.N) * static_cast<int64_t>(sizeof(Weights));
  return weights + with_kernels<BackwardKernels>(a, [&]<class K>(K) { return plan_state<K>(a, a.N).workspace_bytes; });
}

const char* linear_attention_apply_backward(const LinearAttentionArgs& a, void* stream_pointer) {
  if (const char* why = refusal(a)) return why;
  const Stream stream = static_cast<Stream>(stream_pointer);
  const int64_t heads = a.B * a.H;
  if (heads == 0) return nullptr;
  if (a.N == 0) {
    const char* error = fill_zero(a.grad_kv, heads * a.D * a.E * 4, stream);
    return error ? error : fill_zero(a.grad_k_sum, heads * a.D * 4, stream);
  }
  return with_kernels<BackwardKernels>(a, [&]<class K>(K) -> const char* {
    const Runs runs = plan_backward_rows<K>(a, a.N);
    const Plan plan = plan_state<K>(a, a.N);
    if (runs.count > 65535 || plan.splits > 65535) return "linear attention in CUDA C++ takes fewer queries";
    // The workspace: tickets and partial sums, as forward's state has them, then the weights.
    unsigned char* workspace = static_cast<unsigned char*>(a.workspace);
    Weights* weights = reinterpret_cast<Weights*>(workspace + plan.workspace_bytes);

    auto rows = rows_params<K>(a, runs, a.N);
    rows.x = decltype(rows.x)(a.grad_out), rows.y = decltype(rows.y)(a.q);
    rows.y_denom = decltype(rows.y)(a.q_denom), rows.grad_y = decltype(rows.y)(a.grad_q);
    rows.grad_y_denom = decltype(rows.y)(a.grad_q_denom);
    rows.matrix = a.kv, rows.vector = a.k_sum, rows.weights = weights;
    if (const char* error =
            launch(K::kApplyRows, {heads, runs.count, 1}, K::Rows::kThreads, K::Rows::kBytes, stream, rows))
      return error;

    StateParams<typename K::Element> p;
    p.k = decltype(p.k)(a.q), p.v = decltype(p.v)(a.grad_out);
    p.k_denom = decltype(p.k)(a.normalize ? a.q_denom : View{});
    p.heads = a.H, p.tokens = a.N, p.chunk = plan.chunk;
    p.splits = {static_cast<int>(plan.splits), static_cast<int>(plan.group), workspace + plan.ticket_bytes,
                reinterpret_cast<int*>(workspace)};
    p.D = a.D, p.E = a.E, p.feature_map = a.feature_map, p.kv = a.grad_kv, p.k_sum = a.grad_k_sum;
    p.weights = weights, p.kv_factor = a.scale, p.sum_factor = a.normalize ? a.inv_count : 0.f;
    if (plan.ticket_bytes)
      if (const char* error = fill_zero(workspace, plan.ticket_bytes, stream)) return error;
    return launch(K::kState, {heads, plan.splits, plan.column_runs}, K::State::kThreads,
                  K::State::shared_bytes(p.k_denom.data != nullptr, true), stream, p);
  });
}

const char* linear_attention_state_backward(const LinearAttentionArgs& a, void* stream_pointer) {
  if (const char* why = refusal(a)) return why;
  const int64_t heads = a.B * a.H;
  if (heads * a.M == 0) return nullptr;
  if (a.dtype == DType::kFloat32) {  // grad_v = phi(k) grad_kv is what apply computes without division
    LinearAttentionArgs apply = a;
    apply.q = a.k, apply.q_denom = View{}, apply.out = a.grad_v, apply.N = a.M;
    apply.kv = a.grad_kv, apply.k_sum = a.grad_k_sum, apply.normalize = false, apply.scale = 1;
    if (const char* error = linear_attention_apply(apply, stream_pointer)) return error;
  }
  return with_kernels<BackwardKernels>(a, [&]<class K>(K) -> const char* {
    const Runs runs = plan_backward_rows<K>(a, a.M);
    if (runs.count > 65535) return "linear attention in CUDA C++ takes fewer keys";
    auto p = rows_params<K>(a, runs, a.M);
    p.scale = 1;
    p.x = decltype(p.x)(a.v), p.y = decltype(p.x)(a.k), p.y_denom = decltype(p.x)(a.k_denom);
    p.grad_x = decltype(p.x)(a.grad_v), p.grad_y = decltype(p.x)(a.grad_k);
    p.grad_y_denom = decltype(p.x)(a.grad_k_denom);
    p.matrix = a.grad_kv, p.vector = a.grad_k_sum;
    return launch(K::kStateRows, {heads, runs.count, 1}, K::Rows::kThreads, K::Rows::kBytes,
                  static_cast<Stream>(stream_pointer), p);
  });
}

}  // namespace linattn::cuda
