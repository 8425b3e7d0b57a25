"""Layers with parameters: nn, then attention."""
