// What every kernel family says about its tensors.
#pragma once
#include <cstdint>

namespace linattn {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// A (B, H, N, D) tensor: strides in elements, the head dim has stride 1. Null data: absent.
struct View {
  void* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_n = 0;
};

}  // namespace linattn
