"""Tools around the model: the routing viewer, the benchmarks, the table of gradient checks."""
