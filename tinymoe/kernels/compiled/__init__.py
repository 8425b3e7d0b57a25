"""The numba kernels. Nothing else imports numba, and nothing imports this folder until its kernels are chosen.

- **Threads** are numba's. BLAS runs inside them at one thread. A matrix product is `np.dot(a, b, out)` on contiguous
  arrays, as fast in a kernel as from NumPy.
- **Pieces.** Work is cut into pieces of rows that fit in cache (in attention, into groups of heads). A piece goes
  through all that is done with it before the next one starts: for an expert gather, multiply, add the bias, activate,
  multiply. A piece belongs to one expert. An expert with many tokens has many pieces, so unbalanced routing
  costs no more than balanced routing.
- **Ownership.** One thread writes a row of a piece. Where many rows add into one place, there are two ways. For weight
  gradients the first piece writes the result, each other piece writes a partial sum, and these are added later. For
  the sum over a token's experts each thread owns columns of the result, and takes all rows in order.
- **Determinism.** The pieces depend on sizes and routing, never on the number of threads. Partial sums are added in a
  fixed order. So every run has the same bits, whatever the number of threads.

A public function makes its inputs contiguous, allocates, and plans. The compiled functions above it compute.
Axes are those of reference.py, and P pieces, S partial sums (slots).
"""
from . import activations, attention, compile, dense, experts, runtime, updates

MODULES = (activations, dense, attention, experts, updates, runtime, compile)       # where a kernel is looked up
