"""FeatInv-Viz on inversion models, other heat maps, and pages about concepts."""
