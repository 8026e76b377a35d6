// The kernels of linear attention for the emulator, called from tests/test_cuda_linear_attention.py and
// test_cuda_linear_attention_backward.py.
#include "linear_attention.cu"

#include "linear_attention_backward.cu"

#pragma GCC visibility push(default)
extern "C" {
using linattn::DType;
using linattn::View;
using linattn::cuda::LinearAttentionArgs;

// What both entry points and Python agree on: pointers, strides and sizes, all of 8 bytes; then numbers.
struct Call {
  View q, k, v, q_denom, k_denom, out;
  float *kv, *k_sum;
  void* workspace;
  int64_t dtype, B, H, N, M, D, E, feature_map, normalize, multiprocessors;
  double scale, inv_count, eps;
  View grad_out, grad_q, grad_q_denom, grad_k, grad_v, grad_k_denom;  // of the backward passes
  float *grad_kv, *grad_k_sum;
};
static LinearAttentionArgs arguments(const Call& c) {
  LinearAttentionArgs a;
  a.dtype = static_cast<DType>(c.dtype), a.B = c.B, a.H = c.H, a.N = c.N, a.M = c.M;
  a.D = static_cast<int>(c.D), a.E = static_cast<int>(c.E), a.feature_map = static_cast<int>(c.feature_map);
  a.normalize = c.normalize != 0, a.multiprocessors = static_cast<int>(c.multiprocessors);
  a.scale = static_cast<float>(c.scale), a.inv_count = static_cast<float>(c.inv_count);
  a.eps = static_cast<float>(c.eps);
  a.q = c.q, a.k = c.k, a.v = c.v, a.q_denom = c.q_denom, a.k_denom = c.k_denom, a.out = c.out;
  a.kv = c.kv, a.k_sum = c.k_sum, a.workspace = c.workspace;
  a.grad_out = c.grad_out, a.grad_q = c.grad_q, a.grad_q_denom = c.grad_q_denom;
  a.grad_k = c.grad_k, a.grad_v = c.grad_v, a.grad_k_denom = c.grad_k_denom;
  a.grad_kv = c.grad_kv, a.grad_k_sum = c.grad_k_sum;
  return a;
}
int64_t workspace_bytes(const Call* c) { return linattn::cuda::linear_attention_workspace(arguments(*c)); }
const char* state(const Call* c) { return linattn::cuda::linear_attention_state(arguments(*c), nullptr); }
const char* apply(const Call* c) { return linattn::cuda::linear_attention_apply(arguments(*c), nullptr); }
const char* forward(const Call* c) {
  const char* error = state(c);
  return error ? error : apply(c);
}
int64_t apply_backward_workspace_bytes(const Call* c) {
  return linattn::cuda::linear_attention_apply_backward_workspace(arguments(*c));
}
const char* apply_backward(const Call* c) {
  return linattn::cuda::linear_attention_apply_backward(arguments(*c), nullptr);
}
const char* state_backward(const Call* c) {
  return linattn::cuda::linear_attention_state_backward(arguments(*c), nullptr);
}
}
