"""Tools around the model, one command each."""
