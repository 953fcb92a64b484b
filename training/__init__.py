"""Training, evaluation and the embedded world; the only place that imports diffusers and accelerate."""
