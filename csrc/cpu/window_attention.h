// Two-dimensional sliding-window attention on a CPU: what library.cpp and the native tests call. Knows nothing of
// torch.
//
//   out_i = sum_j p_ij v_j,  p_ij = exp(scale q_i.k_j - lse_i),  lse_i = log sum_j exp(scale q_i.k_j),  j over what i
//   sees
//
//   keys      text_length text keys and a grid of height x width in raster order; pooled keys are tensors of their own
//   queries   q_text_length text queries and the rows [q_row, q_row + q_rows) of that grid
//   order     text before image in both if text_first, else after it
//   an image query (y, x) sees all text, the keys (y', x') with (y - y')^2 + (x - x')^2 < radius^2, and all pooled keys
//   a text query sees all text and image keys
//
// A NaN in q stays in its row. A NaN or infinity in k or v reaches the queries that see the key and no others; with
// gradients, what one of q, k, v, grad_out holds reaches the gradients of the pairs that it takes part in.
#pragma once
#include <cstdint>

#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace linattn {

struct WindowAttentionArgs {
  DType dtype = DType::kFloat32;  // of every View
  int64_t B = 0, H = 0;
  int D = 0;
  int64_t height = 0, width = 0, radius = 1, text_length = 0, pooled = 0;
  int64_t q_text_length = 0, q_row = 0, q_rows = 0;
  bool text_first = true;
  float scale = 1;
  View q, k, v, pooled_k, pooled_v, out;
  float* lse = nullptr;  // (B, H, queries), contiguous: written by forward, read by backward
  // Gradients: grad_out and grad_lse (which may be null, else has strides) are read, the others written.
  View grad_out, grad_q, grad_k, grad_v, grad_pooled_k, grad_pooled_v;
  const float* grad_lse = nullptr;
  int64_t grad_lse_stride[3] = {0, 0, 0};
};

// out (B, H, ceil(height / f) * ceil(width / f), D): the sum of each f x f patch of x (B, H, height * width, D) times
// weight (f, f); beyond the edge stands the nearest token.
struct PoolTokensArgs {
  DType dtype = DType::kFloat32;
  int64_t B = 0, H = 0, height = 0, width = 0, f = 1;
  int D = 0;
  View x, out;  // out: of backward the gradient that is read
  const float* weight = nullptr;
  View grad_x;
  float* grad_weight = nullptr;
};

// Each returns false when there is no memory for its scratch. Results do not depend on parallel.threads or on B
// (grad_weight is a sum over B).
struct WindowAttentionKernels {
  bool (*forward)(const WindowAttentionArgs&, const Parallel&);
  bool (*backward)(const WindowAttentionArgs&, const Parallel&);
  bool (*pool)(const PoolTokensArgs&, const Parallel&);
  bool (*pool_backward)(const PoolTokensArgs&, const Parallel&);
};

#define LINATTN_DECLARE(level)                          \
  namespace level {                                     \
  extern const WindowAttentionKernels window_attention; \
  }
LINATTN_FOR_EACH_ISA(LINATTN_DECLARE)
#undef LINATTN_DECLARE

inline const WindowAttentionKernels& window_attention_kernels() {
#define LINATTN_ADDRESS(level) &level::window_attention,
  static const WindowAttentionKernels* const levels[] = {LINATTN_FOR_EACH_ISA(LINATTN_ADDRESS)};
#undef LINATTN_ADDRESS
  return *levels[isa_level()];
}

}  // namespace linattn
