"""Training, evaluation and the making of worlds; the only place that imports diffusers and accelerate."""
