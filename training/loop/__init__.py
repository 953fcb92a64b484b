"""The parts of the training loop of train.py."""
