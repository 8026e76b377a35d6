// The kernels of csrc/cuda/linear_attention.cu for the emulator, called from tests/test_cuda_linear_attention.py.
#include "linear_attention.cu"

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
  return a;
}
int64_t workspace_bytes(const Call* c) { return linattn::cuda::linear_attention_workspace(arguments(*c)); }
const char* state(const Call* c) { return linattn::cuda::linear_attention_state(arguments(*c), nullptr); }
const char* apply(const Call* c) { return linattn::cuda::linear_attention_apply(arguments(*c), nullptr); }
const char* forward(const Call* c) {
  const char* error = state(c);
  return error ? error : apply(c);
}
}
