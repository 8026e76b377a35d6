// Binds the CPU kernels to torch: the only file here that sees a torch header, and only the stable ABI (2.11) of those.
//
// The schemas are defined in Python (linattn.ops), which also validates arguments in words; here is re-checked what
// memory safety depends on. Threads are torch's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "block_causal_attention.h"
#include "linear_attention.h"
#include "window_attention.h"

namespace {

using linattn::BlockCausalAttentionArgs;
using linattn::DType;
using linattn::LinearAttentionArgs;
using linattn::Parallel;
using linattn::PoolTokensArgs;
using linattn::View;
using linattn::WindowAttentionArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Parallel torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int slots, void (*body)(void* context, int slot), void* context) {
            torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
              for (int64_t slot = begin; slot < end; ++slot) body(context, static_cast<int>(slot));
            });
          }};
}

DType dtype_of(const Tensor& x) {
  ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "linattn cpu: expected float32, float16 or bfloat16, got ", torch::headeronly::toString(type));
  return type == ScalarType::Float ? DType::kFloat32 : type == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

// The view of a (B, H, tokens, width) tensor, B, H and the dtype those of `a`.
template <class Args>
View view(const char* name, const Tensor& x, const Args& a, int64_t tokens, int64_t width) {
  STD_TORCH_CHECK(x.dim() == 4, "linattn cpu: ", name, " must have 4 dimensions, got ", x.dim());
  auto size = x.sizes();
  auto stride = x.strides();
  STD_TORCH_CHECK(size[0] == a.B && size[1] == a.H && size[2] == tokens && size[3] == width, "linattn cpu: ", name,
                  " must be (", a.B, ", ", a.H, ", ", tokens, ", ", width, "), got (", size[0], ", ", size[1], ", ",
                  size[2], ", ", size[3], ")");
  STD_TORCH_CHECK(stride[3] == 1 || width == 1 || x.numel() == 0, "linattn cpu: ", name,
                  " must have stride 1 in its last dimension");
  STD_TORCH_CHECK(dtype_of(x) == a.dtype, "linattn cpu: ", name, " has another dtype than the rest");
  return {x.data_ptr(), stride[0], stride[1], stride[2]};
}

template <class Args>
View view(const char* name, const OptionalTensor& x, const Args& a, int64_t tokens, int64_t width) {
  return x ? view(name, *x, a, tokens, width) : View{};
}

// kv (B, H, D, E) or k_sum (B, H, D), or a gradient of theirs.
float* state_pointer(const char* name, const Tensor& x, const LinearAttentionArgs& a, bool matrix) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "linattn cpu: ", name, " must be float32");
  STD_TORCH_CHECK(x.dim() == (matrix ? 4 : 3), "linattn cpu: ", name, " has ", x.dim(), " dimensions");
  auto size = x.sizes();
  STD_TORCH_CHECK(size[0] == a.B && size[1] == a.H && size[2] == a.D && (!matrix || size[3] == a.E),
                  "linattn cpu: ", name, " does not match ", a.B, " x ", a.H, " heads of ", a.D, " x ", a.E);
  STD_TORCH_CHECK(x.is_contiguous(), "linattn cpu: ", name, " must be contiguous");
  return static_cast<float*>(x.data_ptr());
}

// Sizes from a (B, H, tokens, D) tensor.
LinearAttentionArgs args_of(const Tensor& x, int64_t feature_map) {
  STD_TORCH_CHECK(x.dim() == 4, "linattn cpu: expected 4 dimensions (B, H, N, D), got ", x.dim());
  STD_TORCH_CHECK(feature_map >= 0 && feature_map <= 2, "linattn cpu: unknown feature_map ", feature_map);
  LinearAttentionArgs a;
  auto size = x.sizes();
  a.B = size[0], a.H = size[1];
  a.feature_map = static_cast<int>(feature_map);
  a.dtype = dtype_of(x);
  return a;
}

void set_widths(LinearAttentionArgs& a, int64_t D, int64_t E) {
  STD_TORCH_CHECK(D >= 1 && D <= 256 && E >= 1 && E <= 256, "linattn cpu: head dims must be 1..256, got ", D, " and ",
                  E);
  a.D = static_cast<int>(D), a.E = static_cast<int>(E);
}

template <class Args>
void run(bool (*kernel)(const Args&, const Parallel&), const Args& a) {
  STD_TORCH_CHECK(kernel(a, torch_threads()), "linattn cpu: out of memory for the workspace");
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& q_denom,
             const OptionalTensor& k_denom, int64_t feature_map, bool normalize, double scale, double eps,
             const Tensor& out, const OptionalTensor& kv, const OptionalTensor& k_sum) {
  LinearAttentionArgs a = args_of(q, feature_map);
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4, "linattn cpu: k and v must have 4 dimensions");
  a.N = q.size(2), a.M = k.size(2);
  STD_TORCH_CHECK(a.M >= 1, "linattn cpu: there must be at least one key");
  set_widths(a, q.size(3), v.size(3));
  a.normalize = normalize;
  a.scale = static_cast<float>(scale), a.eps = static_cast<float>(eps);
  a.inv_count = static_cast<float>(1.0 / static_cast<double>(a.M));
  a.q = view("q", q, a, a.N, a.D), a.k = view("k", k, a, a.M, a.D), a.v = view("v", v, a, a.M, a.E);
  a.q_denom = view("q_denom", q_denom, a, a.N, a.D), a.k_denom = view("k_denom", k_denom, a, a.M, a.D);
  a.out = view("out", out, a, a.N, a.E);
  STD_TORCH_CHECK(kv.has_value() == k_sum.has_value(), "linattn cpu: kv and k_sum go together");
  if (kv) a.kv = state_pointer("kv", *kv, a, true), a.k_sum = state_pointer("k_sum", *k_sum, a, false);
  run(linattn::linear_attention_kernels().forward, a);
}

void state(const Tensor& k, const Tensor& v, const OptionalTensor& k_denom, int64_t feature_map, const Tensor& kv,
           const Tensor& k_sum) {
  LinearAttentionArgs a = args_of(k, feature_map);
  STD_TORCH_CHECK(v.dim() == 4, "linattn cpu: v must have 4 dimensions");
  a.M = k.size(2);
  set_widths(a, k.size(3), v.size(3));
  a.k = view("k", k, a, a.M, a.D), a.v = view("v", v, a, a.M, a.E);
  a.k_denom = view("k_denom", k_denom, a, a.M, a.D);
  a.kv = state_pointer("kv", kv, a, true), a.k_sum = state_pointer("k_sum", k_sum, a, false);
  run(linattn::linear_attention_kernels().state, a);
}

// What apply and its backward share.
LinearAttentionArgs apply_args(const Tensor& q, const OptionalTensor& q_denom, const Tensor& kv, const Tensor& k_sum,
                               int64_t feature_map, bool normalize, double scale, double inv_count, double eps) {
  LinearAttentionArgs a = args_of(q, feature_map);
  STD_TORCH_CHECK(kv.dim() == 4, "linattn cpu: kv must have 4 dimensions");
  a.N = q.size(2);
  set_widths(a, q.size(3), kv.size(3));
  a.normalize = normalize;
  a.scale = static_cast<float>(scale), a.inv_count = static_cast<float>(inv_count), a.eps = static_cast<float>(eps);
  a.q = view("q", q, a, a.N, a.D), a.q_denom = view("q_denom", q_denom, a, a.N, a.D);
  a.kv = state_pointer("kv", kv, a, true), a.k_sum = state_pointer("k_sum", k_sum, a, false);
  return a;
}

void apply(const Tensor& q, const OptionalTensor& q_denom, const Tensor& kv, const Tensor& k_sum, int64_t feature_map,
           bool normalize, double scale, double inv_count, double eps, const Tensor& out) {
  LinearAttentionArgs a = apply_args(q, q_denom, kv, k_sum, feature_map, normalize, scale, inv_count, eps);
  a.out = view("out", out, a, a.N, a.E);
  run(linattn::linear_attention_kernels().apply, a);
}

void apply_backward(const Tensor& grad_out, const Tensor& q, const OptionalTensor& q_denom, const Tensor& kv,
                    const Tensor& k_sum, int64_t feature_map, bool normalize, double scale, double inv_count,
                    double eps, const Tensor& grad_q, const OptionalTensor& grad_q_denom, const Tensor& grad_kv,
                    const Tensor& grad_k_sum) {
  LinearAttentionArgs a = apply_args(q, q_denom, kv, k_sum, feature_map, normalize, scale, inv_count, eps);
  STD_TORCH_CHECK(q_denom.has_value() == grad_q_denom.has_value(), "linattn cpu: grad_q_denom goes with q_denom");
  a.grad_out = view("grad_out", grad_out, a, a.N, a.E);
  a.grad_q = view("grad_q", grad_q, a, a.N, a.D);
  a.grad_q_denom = view("grad_q_denom", grad_q_denom, a, a.N, a.D);
  a.grad_kv = state_pointer("grad_kv", grad_kv, a, true);
  a.grad_k_sum = state_pointer("grad_k_sum", grad_k_sum, a, false);
  run(linattn::linear_attention_kernels().apply_backward, a);
}

void state_backward(const Tensor& grad_kv, const Tensor& grad_k_sum, const Tensor& k, const Tensor& v,
                    const OptionalTensor& k_denom, int64_t feature_map, const Tensor& grad_k, const Tensor& grad_v,
                    const OptionalTensor& grad_k_denom) {
  LinearAttentionArgs a = args_of(k, feature_map);
  STD_TORCH_CHECK(v.dim() == 4, "linattn cpu: v must have 4 dimensions");
  STD_TORCH_CHECK(k_denom.has_value() == grad_k_denom.has_value(), "linattn cpu: grad_k_denom goes with k_denom");
  a.M = k.size(2);
  set_widths(a, k.size(3), v.size(3));
  a.k = view("k", k, a, a.M, a.D), a.v = view("v", v, a, a.M, a.E);
  a.k_denom = view("k_denom", k_denom, a, a.M, a.D);
  a.grad_kv = state_pointer("grad_kv", grad_kv, a, true);
  a.grad_k_sum = state_pointer("grad_k_sum", grad_k_sum, a, false);
  a.grad_k = view("grad_k", grad_k, a, a.M, a.D), a.grad_v = view("grad_v", grad_v, a, a.M, a.E);
  a.grad_k_denom = view("grad_k_denom", grad_k_denom, a, a.M, a.D);
  run(linattn::linear_attention_kernels().state_backward, a);
}

// ------------------------------------------------------------------------------------------- window attention

// Sizes, q, k, v and the pooled keys.
WindowAttentionArgs window_args(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& pooled_k,
                                const OptionalTensor& pooled_v, int64_t height, int64_t width, int64_t radius,
                                int64_t text_length, bool text_first, int64_t q_row, int64_t q_text_length,
                                double scale) {
  STD_TORCH_CHECK(q.dim() == 4, "linattn cpu: q must have 4 dimensions (B, H, N, D), got ", q.dim());
  constexpr int64_t kMost = int64_t(1) << 22;  // coordinates are compared as float32
  STD_TORCH_CHECK(height >= 0 && height <= kMost && width >= 0 && width <= kMost,
                  "linattn cpu: height and width must be 0..", kMost, ", got ", height, " and ", width);
  STD_TORCH_CHECK(radius >= 1, "linattn cpu: radius must be at least 1, got ", radius);
  STD_TORCH_CHECK(text_length >= 0 && q_text_length >= 0,
                  "linattn cpu: text_length and q_text_length must be at least 0");
  WindowAttentionArgs a;
  auto size = q.sizes();
  a.dtype = dtype_of(q), a.B = size[0], a.H = size[1];
  STD_TORCH_CHECK(size[3] >= 1 && size[3] <= 256, "linattn cpu: the head dim must be 1..256, got ", size[3]);
  a.D = static_cast<int>(size[3]);
  a.height = height, a.width = width, a.radius = radius, a.text_length = text_length, a.text_first = text_first;
  a.q_text_length = q_text_length, a.q_row = q_row;
  int64_t q_image = size[2] - q_text_length;
  STD_TORCH_CHECK(q_image >= 0 && (width ? q_image % width == 0 : q_image == 0), "linattn cpu: q must hold ",
                  q_text_length, " text queries and rows of ", width, ", got ", size[2], " tokens");
  a.q_rows = width ? q_image / width : 0;
  STD_TORCH_CHECK(q_row >= 0 && q_row + a.q_rows <= height, "linattn cpu: the ", a.q_rows, " rows of q from q_row ",
                  q_row, " on must lie in the ", height, " rows of the grid");
  a.scale = static_cast<float>(scale);
  int64_t keys = text_length + height * width;
  a.q = view("q", q, a, size[2], a.D), a.k = view("k", k, a, keys, a.D), a.v = view("v", v, a, keys, a.D);
  STD_TORCH_CHECK(pooled_k.has_value() == pooled_v.has_value(), "linattn cpu: pooled_k and pooled_v go together");
  if (pooled_k) {
    STD_TORCH_CHECK(pooled_k->dim() == 4, "linattn cpu: pooled_k must have 4 dimensions");
    a.pooled = pooled_k->size(2);
    a.pooled_k = view("pooled_k", *pooled_k, a, a.pooled, a.D);
    a.pooled_v = view("pooled_v", *pooled_v, a, a.pooled, a.D);
  }
  return a;
}

// lse (B, H, queries) or its gradient.
template <class Args>
float* rows_pointer(const char* name, const Tensor& x, const Args& a, int64_t queries, bool contiguous) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "linattn cpu: ", name, " must be float32");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == a.B && x.size(1) == a.H && x.size(2) == queries, "linattn cpu: ", name,
                  " must be (", a.B, ", ", a.H, ", ", queries, ")");
  STD_TORCH_CHECK(!contiguous || x.is_contiguous(), "linattn cpu: ", name, " must be contiguous");
  return static_cast<float*>(x.data_ptr());
}

void window_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& pooled_k,
                      const OptionalTensor& pooled_v, int64_t height, int64_t width, int64_t radius,
                      int64_t text_length, bool text_first, int64_t q_row, int64_t q_text_length, double scale,
                      const Tensor& out, const Tensor& lse) {
  WindowAttentionArgs a = window_args(q, k, v, pooled_k, pooled_v, height, width, radius, text_length, text_first,
                                      q_row, q_text_length, scale);
  a.out = view("out", out, a, q.size(2), a.D);
  a.lse = rows_pointer("lse", lse, a, q.size(2), true);
  run(linattn::window_attention_kernels().forward, a);
}

void window_attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k,
                               const Tensor& v, const OptionalTensor& pooled_k, const OptionalTensor& pooled_v,
                               const Tensor& out, const Tensor& lse, int64_t height, int64_t width, int64_t radius,
                               int64_t text_length, bool text_first, int64_t q_row, int64_t q_text_length, double scale,
                               const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
                               const OptionalTensor& grad_pooled_k, const OptionalTensor& grad_pooled_v) {
  WindowAttentionArgs a = window_args(q, k, v, pooled_k, pooled_v, height, width, radius, text_length, text_first,
                                      q_row, q_text_length, scale);
  int64_t queries = q.size(2), keys = k.size(2);
  a.grad_out = view("grad_out", grad_out, a, queries, a.D), a.out = view("out", out, a, queries, a.D);
  a.lse = rows_pointer("lse", lse, a, queries, true);
  if (grad_lse) {
    a.grad_lse = rows_pointer("grad_lse", *grad_lse, a, queries, false);
    for (int i = 0; i < 3; ++i) a.grad_lse_stride[i] = grad_lse->stride(i);
  }
  a.grad_q = view("grad_q", grad_q, a, queries, a.D);
  a.grad_k = view("grad_k", grad_k, a, keys, a.D), a.grad_v = view("grad_v", grad_v, a, keys, a.D);
  STD_TORCH_CHECK(
      pooled_k.has_value() == grad_pooled_k.has_value() && pooled_v.has_value() == grad_pooled_v.has_value(),
      "linattn cpu: grad_pooled_k and grad_pooled_v go with pooled_k and pooled_v");
  a.grad_pooled_k = view("grad_pooled_k", grad_pooled_k, a, a.pooled, a.D);
  a.grad_pooled_v = view("grad_pooled_v", grad_pooled_v, a, a.pooled, a.D);
  run(linattn::window_attention_kernels().backward, a);
}

PoolTokensArgs pool_args(const Tensor& x, const Tensor& weight, int64_t height, int64_t width) {
  STD_TORCH_CHECK(x.dim() == 4, "linattn cpu: x must have 4 dimensions (B, H, N, D), got ", x.dim());
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == weight.size(1) && weight.size(0) >= 1,
                  "linattn cpu: weight must be (f, f)");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_contiguous(),
                  "linattn cpu: weight must be float32 and contiguous");
  STD_TORCH_CHECK(height >= 0 && width >= 0, "linattn cpu: height and width must be at least 0");
  PoolTokensArgs a;
  auto size = x.sizes();
  a.dtype = dtype_of(x), a.B = size[0], a.H = size[1], a.D = static_cast<int>(size[3]);
  a.height = height, a.width = width, a.f = weight.size(0);
  a.x = view("x", x, a, height * width, a.D);
  a.weight = static_cast<const float*>(weight.data_ptr());
  return a;
}

int64_t pooled_tokens(const PoolTokensArgs& a) { return (a.height + a.f - 1) / a.f * ((a.width + a.f - 1) / a.f); }

void pool_tokens(const Tensor& x, const Tensor& weight, int64_t height, int64_t width, const Tensor& out) {
  PoolTokensArgs a = pool_args(x, weight, height, width);
  a.out = view("out", out, a, pooled_tokens(a), a.D);
  run(linattn::window_attention_kernels().pool, a);
}

void pool_tokens_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, int64_t height, int64_t width,
                          const Tensor& grad_x, const Tensor& grad_weight) {
  PoolTokensArgs a = pool_args(x, weight, height, width);
  a.out = view("grad_out", grad_out, a, pooled_tokens(a), a.D);
  a.grad_x = view("grad_x", grad_x, a, height * width, a.D);
  STD_TORCH_CHECK(grad_weight.scalar_type() == ScalarType::Float && grad_weight.is_contiguous() &&
                      grad_weight.dim() == 2 && grad_weight.size(0) == a.f && grad_weight.size(1) == a.f,
                  "linattn cpu: grad_weight must be float32, contiguous and of the shape of weight");
  a.grad_weight = static_cast<float*>(grad_weight.data_ptr());
  run(linattn::window_attention_kernels().pool_backward, a);
}

// ------------------------------------------------------------------------------------- block-causal attention

// Sizes, q, k and v.
BlockCausalAttentionArgs block_causal_args(const Tensor& q, const Tensor& k, const Tensor& v, int64_t height,
                                           int64_t width, int64_t block, bool clamp, int64_t q_row, double scale) {
  STD_TORCH_CHECK(q.dim() == 4, "linattn cpu: q must have 4 dimensions (B, H, N, D), got ", q.dim());
  STD_TORCH_CHECK(block >= 1, "linattn cpu: block must be at least 1, got ", block);
  STD_TORCH_CHECK(height >= 0 && width >= 0 && q_row >= 0,
                  "linattn cpu: height, width and q_row must be at least 0, got ", height, ", ", width, " and ", q_row);
  STD_TORCH_CHECK(height % block == 0 && width % block == 0 && q_row % block == 0,
                  "linattn cpu: height, width and q_row must be multiples of block = ", block, ", got ", height, ", ",
                  width, " and ", q_row);
  BlockCausalAttentionArgs a;
  auto size = q.sizes();
  a.dtype = dtype_of(q), a.B = size[0], a.H = size[1];
  STD_TORCH_CHECK(size[3] >= 1 && size[3] <= 256, "linattn cpu: the head dim must be 1..256, got ", size[3]);
  a.D = static_cast<int>(size[3]);
  int64_t rows = width ? size[2] / width : 0;
  STD_TORCH_CHECK(rows * width == size[2] && rows % block == 0 && q_row + rows <= height,
                  "linattn cpu: q must hold rows of blocks of the ", height, " x ", width, " grid from q_row ", q_row,
                  " on, got ", size[2], " tokens");
  if (height == 0 || width == 0) block = 1;  // there are no blocks: their area need not fit
  a.rows = height / block, a.columns = width / block, a.block = block;
  a.q_row = q_row / block, a.q_rows = rows / block;
  a.clamp = clamp, a.scale = static_cast<float>(scale);
  a.q = view("q", q, a, size[2], a.D);
  a.k = view("k", k, a, height * width, a.D), a.v = view("v", v, a, height * width, a.D);
  return a;
}

// slot_embed or its gradient.
float* slots_pointer(const char* name, const Tensor& x, const BlockCausalAttentionArgs& a) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "linattn cpu: ", name,
                  " must be float32 and contiguous");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == 4 && x.size(1) == a.H && x.size(2) == a.D, "linattn cpu: ", name,
                  " must be (4, ", a.H, ", ", a.D, ")");
  return static_cast<float*>(x.data_ptr());
}

void block_causal_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& slot_embed,
                            int64_t height, int64_t width, int64_t block, bool clamp, int64_t q_row, double scale,
                            const Tensor& out, const Tensor& lse) {
  BlockCausalAttentionArgs a = block_causal_args(q, k, v, height, width, block, clamp, q_row, scale);
  if (slot_embed) a.slot_embed = slots_pointer("slot_embed", *slot_embed, a);
  a.out = view("out", out, a, q.size(2), a.D);
  a.lse = rows_pointer("lse", lse, a, q.size(2), true);
  run(linattn::block_causal_attention_kernels().forward, a);
}

void block_causal_attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q,
                                     const Tensor& k, const Tensor& v, const OptionalTensor& slot_embed,
                                     const Tensor& out, const Tensor& lse, int64_t height, int64_t width, int64_t block,
                                     bool clamp, int64_t q_row, double scale, const Tensor& grad_q,
                                     const Tensor& grad_k, const Tensor& grad_v,
                                     const OptionalTensor& grad_slot_embed) {
  BlockCausalAttentionArgs a = block_causal_args(q, k, v, height, width, block, clamp, q_row, scale);
  if (slot_embed) a.slot_embed = slots_pointer("slot_embed", *slot_embed, a);
  STD_TORCH_CHECK(slot_embed.has_value() == grad_slot_embed.has_value(),
                  "linattn cpu: grad_slot_embed goes with slot_embed");
  if (grad_slot_embed) a.grad_slot_embed = slots_pointer("grad_slot_embed", *grad_slot_embed, a);
  int64_t queries = q.size(2), keys = k.size(2);
  a.grad_out = view("grad_out", grad_out, a, queries, a.D), a.out = view("out", out, a, queries, a.D);
  a.lse = rows_pointer("lse", lse, a, queries, true);
  if (grad_lse) {
    a.grad_lse = rows_pointer("grad_lse", *grad_lse, a, queries, false);
    for (int i = 0; i < 3; ++i) a.grad_lse_stride[i] = grad_lse->stride(i);
  }
  a.grad_q = view("grad_q", grad_q, a, queries, a.D);
  a.grad_k = view("grad_k", grad_k, a, keys, a.D), a.grad_v = view("grad_v", grad_v, a, keys, a.D);
  run(linattn::block_causal_attention_kernels().backward, a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linattn, CPU, m) {
  m.impl("_linear_attention_cpu", TORCH_BOX(&forward));
  m.impl("_linear_attention_state_cpu", TORCH_BOX(&state));
  m.impl("_linear_attention_apply_cpu", TORCH_BOX(&apply));
  m.impl("_linear_attention_apply_backward_cpu", TORCH_BOX(&apply_backward));
  m.impl("_linear_attention_state_backward_cpu", TORCH_BOX(&state_backward));
  m.impl("_window_attention_cpu", TORCH_BOX(&window_attention));
  m.impl("_window_attention_backward_cpu", TORCH_BOX(&window_attention_backward));
  m.impl("_pool_tokens_cpu", TORCH_BOX(&pool_tokens));
  m.impl("_pool_tokens_backward_cpu", TORCH_BOX(&pool_tokens_backward));
  m.impl("_block_causal_attention_cpu", TORCH_BOX(&block_causal_attention));
  m.impl("_block_causal_attention_backward_cpu", TORCH_BOX(&block_causal_attention_backward));
}
