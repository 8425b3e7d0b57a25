"""Reverse-mode automatic differentiation: tensor, then functional, then gradcheck."""
