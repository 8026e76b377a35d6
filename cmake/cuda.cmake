set(LINATTN_CUDA_SUMMARY "not built: no .cu file in csrc/cuda")
