"""Feature spaces without an inversion model: linear maps of them, and how much of an image they keep."""
