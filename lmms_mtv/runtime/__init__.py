"""The machine and the libraries that a model runs in."""
