"""The embedded world: what is drawn, and how its backbones, autoencoder and base model are trained."""
