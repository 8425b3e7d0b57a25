"""The numba kernels: runtime, activations, dense, attention, experts, updates. The only folder that imports numba."""
