"""Pictures for training: listed, read, cropped, cached."""
