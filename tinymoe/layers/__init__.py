"""Layers with parameters: nn, then attention, then latent_attention."""
