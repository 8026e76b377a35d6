// Binds the CUDA kernels to torch: the only file here that sees a torch header, and only the stable ABI (2.11) of
// those.
//
// The schemas are defined in Python (linattn.ops), which also validates arguments in words; here is re-checked what
// memory safety depends on. Work goes to the current stream of the tensors' device.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <optional>
#include <string_view>

#include "linear_attention.h"

namespace {

using linattn::DType;
using linattn::View;
using linattn::cuda::LinearAttentionArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& x) {
  ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "linattn cuda: expected float32, float16 or bfloat16, got ", torch::headeronly::toString(type));
  return type == ScalarType::Float ? DType::kFloat32 : type == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

int32_t device_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda(), "linattn cuda: expected tensors on a CUDA device");
  return x.get_device_index();
}

// Where a call's tensors must lie, and where its work goes.
struct Place {
  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit Place(const Tensor& x) : device(device_of(x)), guard(device) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                    "linattn cuda: torch has no current stream for device ", device);
  }
  void check(const char* name, const Tensor& x) const {
    STD_TORCH_CHECK(device_of(x) == device, "linattn cuda: ", name, " is on another device");
  }
  int multiprocessors() const {
    int count = 0;
    cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    STD_TORCH_CHECK(error == cudaSuccess, "linattn cuda: ", cudaGetErrorString(error));
    return count;
  }
};

// The view of a (B, H, tokens, width) tensor, B, H and the dtype those of `a`.
View view(const char* name, const Tensor& x, const LinearAttentionArgs& a, const Place& place, int64_t tokens,
          int64_t width) {
  STD_TORCH_CHECK(x.dim() == 4, "linattn cuda: ", name, " must have 4 dimensions, got ", x.dim());
  place.check(name, x);
  auto size = x.sizes();
  auto stride = x.strides();
  STD_TORCH_CHECK(size[0] == a.B && size[1] == a.H && size[2] == tokens && size[3] == width, "linattn cuda: ", name,
                  " must be (", a.B, ", ", a.H, ", ", tokens, ", ", width, "), got (", size[0], ", ", size[1], ", ",
                  size[2], ", ", size[3], ")");
  STD_TORCH_CHECK(stride[3] == 1 || width == 1 || x.numel() == 0, "linattn cuda: ", name,
                  " must have stride 1 in its last dimension");
  STD_TORCH_CHECK(dtype_of(x) == a.dtype, "linattn cuda: ", name, " has another dtype than the rest");
  return {x.data_ptr(), stride[0], stride[1], stride[2]};
}
View view(const char* name, const OptionalTensor& x, const LinearAttentionArgs& a, const Place& place, int64_t tokens,
          int64_t width) {
  return x ? view(name, *x, a, place, tokens, width) : View{};
}

// kv (B, H, D, E) or k_sum (B, H, D).
float* state_pointer(const char* name, const Tensor& x, const LinearAttentionArgs& a, const Place& place, bool matrix) {
  place.check(name, x);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "linattn cuda: ", name, " must be float32");
  STD_TORCH_CHECK(x.dim() == (matrix ? 4 : 3), "linattn cuda: ", name, " has ", x.dim(), " dimensions");
  auto size = x.sizes();
  STD_TORCH_CHECK(size[0] == a.B && size[1] == a.H && size[2] == a.D && (!matrix || size[3] == a.E),
                  "linattn cuda: ", name, " does not match ", a.B, " x ", a.H, " heads of ", a.D, " x ", a.E);
  STD_TORCH_CHECK(x.is_contiguous(), "linattn cuda: ", name, " must be contiguous");
  return static_cast<float*>(x.data_ptr());
}

// Sizes from a (B, H, tokens, D) tensor.
LinearAttentionArgs args_of(const Tensor& x, int64_t feature_map, const Place& place) {
  STD_TORCH_CHECK(x.dim() == 4, "linattn cuda: expected 4 dimensions (B, H, N, D), got ", x.dim());
  STD_TORCH_CHECK(feature_map >= 0 && feature_map <= 2, "linattn cuda: unknown feature_map ", feature_map);
  LinearAttentionArgs a;
  a.B = x.size(0), a.H = x.size(1);
  a.feature_map = static_cast<int>(feature_map);
  a.dtype = dtype_of(x);
  a.multiprocessors = place.multiprocessors();
  return a;
}
void set_widths(LinearAttentionArgs& a, int64_t D, int64_t E) {
  STD_TORCH_CHECK(D >= 1 && D <= 256 && E >= 1 && E <= 256, "linattn cuda: head dims must be 1..256, got ", D, " and ",
                  E);
  a.D = static_cast<int>(D), a.E = static_cast<int>(E);
}
void set_keys(LinearAttentionArgs& a, const Tensor& k, const Tensor& v, const OptionalTensor& k_denom,
              const Place& place) {
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4, "linattn cuda: k and v must have 4 dimensions");
  a.M = k.size(2);
  STD_TORCH_CHECK(a.M >= 1, "linattn cuda: there must be at least one key");
  set_widths(a, k.size(3), v.size(3));
  a.k = view("k", k, a, place, a.M, a.D), a.v = view("v", v, a, place, a.M, a.E);
  a.k_denom = view("k_denom", k_denom, a, place, a.M, a.D);
}

void run(const char* (*kernel)(const LinearAttentionArgs&, void*), const LinearAttentionArgs& a, const Place& place) {
  const char* error = kernel(a, place.stream);
  STD_TORCH_CHECK(error == nullptr, "linattn cuda: ", error ? error : "");
}
// The caching allocator gives memory back to this stream only, so a workspace may go while its kernels are under way.
void run_state(LinearAttentionArgs& a, const Tensor& like, const Place& place) {
  Tensor workspace = torch::stable::new_empty(like, {linattn::cuda::linear_attention_workspace(a)}, ScalarType::Byte);
  a.workspace = workspace.data_ptr();
  run(linattn::cuda::linear_attention_state, a, place);
}

void state(const Tensor& k, const Tensor& v, const OptionalTensor& k_denom, int64_t feature_map, const Tensor& kv,
           const Tensor& k_sum) {
  Place place(k);
  LinearAttentionArgs a = args_of(k, feature_map, place);
  set_keys(a, k, v, k_denom, place);
  a.kv = state_pointer("kv", kv, a, place, true), a.k_sum = state_pointer("k_sum", k_sum, a, place, false);
  run_state(a, k, place);
}

void apply(const Tensor& q, const OptionalTensor& q_denom, const Tensor& kv, const Tensor& k_sum, int64_t feature_map,
           bool normalize, double scale, double inv_count, double eps, const Tensor& out) {
  Place place(q);
  LinearAttentionArgs a = args_of(q, feature_map, place);
  STD_TORCH_CHECK(kv.dim() == 4, "linattn cuda: kv must have 4 dimensions");
  a.N = q.size(2);
  set_widths(a, q.size(3), kv.size(3));
  a.normalize = normalize;
  a.scale = static_cast<float>(scale), a.inv_count = static_cast<float>(inv_count), a.eps = static_cast<float>(eps);
  a.q = view("q", q, a, place, a.N, a.D), a.q_denom = view("q_denom", q_denom, a, place, a.N, a.D);
  a.kv = state_pointer("kv", kv, a, place, true), a.k_sum = state_pointer("k_sum", k_sum, a, place, false);
  a.out = view("out", out, a, place, a.N, a.E);
  run(linattn::cuda::linear_attention_apply, a, place);
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& q_denom,
             const OptionalTensor& k_denom, int64_t feature_map, bool normalize, double scale, double eps,
             const Tensor& out, const OptionalTensor& kv, const OptionalTensor& k_sum) {
  Place place(q);
  LinearAttentionArgs a = args_of(q, feature_map, place);
  set_keys(a, k, v, k_denom, place);
  a.N = q.size(2);
  a.normalize = normalize;
  a.scale = static_cast<float>(scale), a.eps = static_cast<float>(eps);
  a.inv_count = static_cast<float>(1.0 / static_cast<double>(a.M));
  a.q = view("q", q, a, place, a.N, a.D), a.q_denom = view("q_denom", q_denom, a, place, a.N, a.D);
  a.out = view("out", out, a, place, a.N, a.E);
  STD_TORCH_CHECK(kv.has_value() == k_sum.has_value(), "linattn cuda: kv and k_sum go together");
  const int64_t heads = a.B * a.H, matrix = heads * a.D * a.E;
  OptionalTensor own;
  if (kv) {
    a.kv = state_pointer("kv", *kv, a, place, true), a.k_sum = state_pointer("k_sum", *k_sum, a, place, false);
  } else {
    own = torch::stable::new_empty(q, {matrix + heads * a.D}, ScalarType::Float);
    a.kv = static_cast<float*>(own->data_ptr()), a.k_sum = a.kv + matrix;
  }
  run_state(a, q, place);
  run(linattn::cuda::linear_attention_apply, a, place);
}

void apply_backward(const Tensor& grad_out, const Tensor& q, const OptionalTensor& q_denom, const Tensor& kv,
                    const Tensor& k_sum, int64_t feature_map, bool normalize, double scale, double inv_count,
                    double eps, const Tensor& grad_q, const OptionalTensor& grad_q_denom, const Tensor& grad_kv,
                    const Tensor& grad_k_sum) {
  Place place(q);
  LinearAttentionArgs a = args_of(q, feature_map, place);
  STD_TORCH_CHECK(kv.dim() == 4, "linattn cuda: kv must have 4 dimensions");
  STD_TORCH_CHECK(q_denom.has_value() == grad_q_denom.has_value(),
                  "linattn cuda: q_denom and grad_q_denom go together");
  a.N = q.size(2);
  set_widths(a, q.size(3), kv.size(3));
  a.normalize = normalize;
  a.scale = static_cast<float>(scale), a.inv_count = static_cast<float>(inv_count), a.eps = static_cast<float>(eps);
  a.grad_out = view("grad_out", grad_out, a, place, a.N, a.E);
  a.q = view("q", q, a, place, a.N, a.D), a.q_denom = view("q_denom", q_denom, a, place, a.N, a.D);
  a.kv = state_pointer("kv", kv, a, place, true), a.k_sum = state_pointer("k_sum", k_sum, a, place, false);
  a.grad_q = view("grad_q", grad_q, a, place, a.N, a.D);
  a.grad_q_denom = view("grad_q_denom", grad_q_denom, a, place, a.N, a.D);
  a.grad_kv = state_pointer("grad_kv", grad_kv, a, place, true);
  a.grad_k_sum = state_pointer("grad_k_sum", grad_k_sum, a, place, false);
  Tensor workspace =
      torch::stable::new_empty(q, {linattn::cuda::linear_attention_apply_backward_workspace(a)}, ScalarType::Byte);
  a.workspace = workspace.data_ptr();
  run(linattn::cuda::linear_attention_apply_backward, a, place);
}

void state_backward(const Tensor& grad_kv, const Tensor& grad_k_sum, const Tensor& k, const Tensor& v,
                    const OptionalTensor& k_denom, int64_t feature_map, const Tensor& grad_k, const Tensor& grad_v,
                    const OptionalTensor& grad_k_denom) {
  Place place(k);
  LinearAttentionArgs a = args_of(k, feature_map, place);
  set_keys(a, k, v, k_denom, place);
  STD_TORCH_CHECK(k_denom.has_value() == grad_k_denom.has_value(),
                  "linattn cuda: k_denom and grad_k_denom go together");
  a.grad_kv = state_pointer("grad_kv", grad_kv, a, place, true);
  a.grad_k_sum = state_pointer("grad_k_sum", grad_k_sum, a, place, false);
  a.grad_k = view("grad_k", grad_k, a, place, a.M, a.D), a.grad_v = view("grad_v", grad_v, a, place, a.M, a.E);
  a.grad_k_denom = view("grad_k_denom", grad_k_denom, a, place, a.M, a.D);
  run(linattn::cuda::linear_attention_state_backward, a, place);
}

// These kernels have run in the emulator only, never on a GPU (docs/cuda.md): "auto" must not find them.
bool asked_for() {
  const char* backend = std::getenv("LINATTN_BACKEND");
  return backend && std::string_view(backend) == "cuda";
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linattn, CUDA, m) {
  if (!asked_for()) return;
  m.impl("_linear_attention_cuda", TORCH_BOX(&forward));
  m.impl("_linear_attention_state_cuda", TORCH_BOX(&state));
  m.impl("_linear_attention_apply_cuda", TORCH_BOX(&apply));
  m.impl("_linear_attention_apply_backward_cuda", TORCH_BOX(&apply_backward));
  m.impl("_linear_attention_state_backward_cuda", TORCH_BOX(&state_backward));
}
