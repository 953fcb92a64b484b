"""FeatInv: see what a vision model sees."""
