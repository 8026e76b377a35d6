// Binds the CPU kernels to torch: the only file here that sees a torch header, and only the stable ABI (2.11) of those.
//
// The schemas are defined in Python (linattn.ops), which also validates arguments in words; here is re-checked what
// memory safety depends on. Threads are torch's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "linear_attention.h"

namespace {

using linattn::DType;
using linattn::LinearAttentionArgs;
using linattn::Parallel;
using linattn::View;
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

View view(const char* name, const Tensor& x, const LinearAttentionArgs& a, int64_t tokens, int64_t width) {
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

View view(const char* name, const OptionalTensor& x, const LinearAttentionArgs& a, int64_t tokens, int64_t width) {
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

using Kernel = bool (*)(const LinearAttentionArgs&, const Parallel&);
void run(Kernel kernel, const LinearAttentionArgs& a) {
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linattn, CPU, m) {
  m.impl("_linear_attention_cpu", TORCH_BOX(&forward));
  m.impl("_linear_attention_state_cpu", TORCH_BOX(&state));
  m.impl("_linear_attention_apply_cpu", TORCH_BOX(&apply));
  m.impl("_linear_attention_apply_backward_cpu", TORCH_BOX(&apply_backward));
  m.impl("_linear_attention_state_backward_cpu", TORCH_BOX(&state_backward));
}
