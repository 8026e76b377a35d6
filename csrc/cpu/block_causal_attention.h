// Block-causal attention on a CPU: what library.cpp and the native tests call. Knows nothing of torch.
//
//   out_i = sum_{s,j} p_isj v_j,  p_isj = exp(scale q_i.(k_j + e_s) - lse_i),  over the four slots s of the block of i
//
//   keys      a grid of rows x columns blocks of block x block tokens, the tokens in raster order
//   queries   the rows of blocks [q_row, q_row + q_rows) of that grid
//   slots     of block (i, j): self (i, j), top-left (i-1, j-1), left (i, j-1), top (i-1, j). A missing one is replaced
//             by the nearest block if clamp (which is then attended again), else it is left out
//
// A NaN in q stays in its row. A NaN or infinity in k or v reaches the queries that see the key and no others; with
// gradients, what one of q, k, v, grad_out holds reaches the gradients of the pairs that it takes part in.
#pragma once
#include <cstdint>

#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace linattn {

struct BlockCausalAttentionArgs {
  DType dtype = DType::kFloat32;  // of every View
  int64_t B = 0, H = 0;
  int D = 0;
  int64_t rows = 0, columns = 0, block = 1;  // of keys, in blocks; tokens along one side of a block
  int64_t q_row = 0, q_rows = 0;             // in blocks
  bool clamp = true;
  float scale = 1;
  View q, k, v, out;
  const float* slot_embed = nullptr;  // (4, H, D), contiguous; may be null: zeros
  float* lse = nullptr;               // (B, H, queries), contiguous: written by forward, read by backward
  // Gradients: grad_out and grad_lse (which may be null, else has strides) are read, the others written.
  View grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse = nullptr;
  int64_t grad_lse_stride[3] = {0, 0, 0};
  float* grad_slot_embed = nullptr;  // as slot_embed, and null with it
};

// Each returns false when there is no memory for its scratch. Results do not depend on parallel.threads or on B
// (grad_slot_embed is a sum over B).
struct BlockCausalAttentionKernels {
  bool (*forward)(const BlockCausalAttentionArgs&, const Parallel&);
  bool (*backward)(const BlockCausalAttentionArgs&, const Parallel&);
};

#define LINATTN_DECLARE(level)                                     \
  namespace level {                                                \
  extern const BlockCausalAttentionKernels block_causal_attention; \
  }
LINATTN_FOR_EACH_ISA(LINATTN_DECLARE)
#undef LINATTN_DECLARE

inline const BlockCausalAttentionKernels& block_causal_attention_kernels() {
#define LINATTN_ADDRESS(level) &level::block_causal_attention,
  static const BlockCausalAttentionKernels* const levels[] = {LINATTN_FOR_EACH_ISA(LINATTN_ADDRESS)};
#undef LINATTN_ADDRESS
  return *levels[isa_level()];
}

}  // namespace linattn
