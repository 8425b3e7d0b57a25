"""Layers with parameters: nn, then attention, then windowed_attention and latent_attention."""
