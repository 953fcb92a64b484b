"""The only place that imports comfy: model loading, the feature ControlNet, folders."""
