"""Fitting: activations and losses of training examples, and the choices that are learned from losses."""
