"""What made the published pages: each program writes one of them, from models and data that are at hand."""
