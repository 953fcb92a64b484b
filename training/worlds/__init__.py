"""How the embedded worlds are made: backbones, autoencoders, base models and inversion models."""
