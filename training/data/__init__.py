"""Images for training: listed, read, cropped, cached."""
