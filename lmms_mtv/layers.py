"""The names of :mod:`lmms_mtv.fit.layers` where methods written for version 0.1 import them."""

from lmms_mtv.fit.layers import best_layer

__all__ = ["best_layer"]
