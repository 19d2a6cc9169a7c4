"""The data, training and evaluation of flux-emoji, a small text-conditioned FLUX."""
