"""Training one run: texts, data, optimizer, loop, and the run's folder."""
