// Bidirectional linear attention on a CPU: what library.cpp and the native tests call. Knows nothing of torch.
//
//   kv = sum_j phi(k_j)^T v_j,  k_sum = sum_j phi(k_j),  z_i = phi(q_i) . (inv_count k_sum) + eps,
//   out_i = phi(q_i) (scale kv) / z_i
#pragma once
#include <cstdint>

#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace linattn {

struct LinearAttentionArgs {
  DType dtype = DType::kFloat32;  // of every View
  int64_t B = 0, H = 0, N = 0, M = 0;
  int D = 0, E = 0;
  int feature_map = 0;  // 0 identity, 1 relu, 2 elu1
  bool normalize = true;
  float scale = 1, inv_count = 1, eps = 0;
  View q, k, v, q_denom, k_denom, out;
  float* kv = nullptr;     // (B, H, D, E), sum form: read by apply and apply_backward, else written unless null
  float* k_sum = nullptr;  // (B, H, D)
  // Gradients. state_backward reads grad_kv and grad_k_sum, apply_backward writes them.
  View grad_out, grad_q, grad_q_denom, grad_k, grad_v, grad_k_denom;
  float* grad_kv = nullptr;
  float* grad_k_sum = nullptr;
};

// Each returns false when there is no memory for its scratch. Results do not depend on parallel.threads or on B.
struct LinearAttentionKernels {
  bool (*forward)(const LinearAttentionArgs&, const Parallel&);         // q k v [denoms] -> out [kv k_sum]
  bool (*state)(const LinearAttentionArgs&, const Parallel&);           // k v [k_denom] -> kv k_sum
  bool (*apply)(const LinearAttentionArgs&, const Parallel&);           // q [q_denom] kv k_sum -> out
  bool (*apply_backward)(const LinearAttentionArgs&, const Parallel&);  // grad_out q kv k_sum -> grad_q grad_kv ...
  bool (*state_backward)(const LinearAttentionArgs&, const Parallel&);  // grad_kv grad_k_sum k v -> grad_k grad_v ...
};

#define LINATTN_DECLARE(level)                          \
  namespace level {                                     \
  extern const LinearAttentionKernels linear_attention; \
  }
LINATTN_FOR_EACH_ISA(LINATTN_DECLARE)
#undef LINATTN_DECLARE

inline const LinearAttentionKernels& linear_attention_kernels() {
#define LINATTN_ADDRESS(level) &level::linear_attention,
  static const LinearAttentionKernels* const levels[] = {LINATTN_FOR_EACH_ISA(LINATTN_ADDRESS)};
#undef LINATTN_ADDRESS
  return *levels[isa_level()];
}

}  // namespace linattn
