"""A page on which a score-based model can be watched and played with: ``diffusers-sde space``."""
