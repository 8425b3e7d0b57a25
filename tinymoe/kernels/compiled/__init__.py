"""The numba kernels. Only this folder imports numba, and it is imported only when its kernels are chosen.

- **Threads** are numba's. Within one of them `multiply` of product.py computes a product of matrices.
- **Pieces.** Work is cut into pieces of rows that fit in cache (in attention, into groups of heads). A piece goes
  through all steps before the next piece starts. A piece belongs to one expert, and an expert with many tokens has many
  pieces. So unbalanced routing costs no more than balanced routing.
- **Ownership.** One thread writes a piece's rows. For weight gradients, the first piece writes the result and each
  other piece a partial sum, to be added later. For the sum over a token's experts, each thread owns columns.
- **Determinism.** Pieces depend on sizes and routing, not on the number of threads, and partial sums are added in a
  fixed order. So every run has the same bits on any number of threads.

A public function has the docstring of its twin in reference.py. It makes its inputs contiguous, allocates and plans,
and refuses arrays that do not fit together, because compiled code would go beyond them. The compiled functions above it
compute. They trust the allocator: where memory is short within a thread, numba loses the error.
"""
from . import activations, attention, compile, dense, experts, runtime, updates

MODULES = (activations, dense, attention, experts, updates, runtime, compile)       # where a kernel is looked up
