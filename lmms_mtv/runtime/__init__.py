"""The machine and the libraries with which a model runs."""
