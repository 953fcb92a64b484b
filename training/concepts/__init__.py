"""What is drawn and measured of concepts."""
