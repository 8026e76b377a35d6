"""Distillation of diffusion models into students with linear attention."""
