"""Diffusion models and inversion models: opened, steered, sampled."""
