"""The arithmetic of LoRA and DoRA: pure functions, autograd functions, Triton kernels and the norm cache."""
