// Bidirectional linear attention on a GPU: what library.cpp and the emulated tests call. Knows nothing of torch.
//
//   kv = sum_j phi(k_j)^T v_j,  k_sum = sum_j phi(k_j),  z_i = phi(q_i) . (inv_count k_sum) + eps,
//   out_i = phi(q_i) (scale kv) / z_i
#pragma once
#include <cstdint>

#include "../cpu/tensor.h"

namespace linattn::cuda {

struct LinearAttentionArgs {
  DType dtype = DType::kFloat16;  // of every View
  int64_t B = 0, H = 0, N = 0, M = 0;
  int D = 0, E = 0;
  int feature_map = 0;  // 0 identity, 1 relu, 2 elu1
  bool normalize = true;
  float scale = 1, inv_count = 1, eps = 0;
  View q, k, v, q_denom, k_denom, out;
  float* kv = nullptr;     // (B, H, D, E), sum form, contiguous
  float* k_sum = nullptr;  // (B, H, D)
  // Of the backward passes:
  View grad_out, grad_q, grad_q_denom, grad_k, grad_v, grad_k_denom;
  float* grad_kv = nullptr;     // as kv
  float* grad_k_sum = nullptr;  // as k_sum
  int multiprocessors = 1;
  void* workspace = nullptr;  // of the bytes that a `_workspace` says, at a multiple of 256
};

// Bytes that `state` needs for partial sums: they depend on B, H, M, D, E, dtype and multiprocessors.
int64_t linear_attention_workspace(const LinearAttentionArgs&);

// Each returns null, or why it was not launched. stream is a cudaStream_t of the current device.
const char* linear_attention_state(const LinearAttentionArgs&, void* stream);  // k v [k_denom] -> kv k_sum
const char* linear_attention_apply(const LinearAttentionArgs&, void* stream);  // q [q_denom] kv k_sum -> out

// Bytes that apply's backward needs: they depend on B, H, N, D, E, dtype and multiprocessors.
int64_t linear_attention_apply_backward_workspace(const LinearAttentionArgs&);
// grad_out q [q_denom] kv k_sum -> grad_q [grad_q_denom] grad_kv grad_k_sum
const char* linear_attention_apply_backward(const LinearAttentionArgs&, void* stream);
// grad_kv grad_k_sum k v [k_denom] -> grad_k grad_v [grad_k_denom]. Without a workspace.
const char* linear_attention_state_backward(const LinearAttentionArgs&, void* stream);

}  // namespace linattn::cuda
