"""The method in plain PyTorch; imports neither the host nor diffusers."""
