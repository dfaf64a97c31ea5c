"""The names of :mod:`lmms_mtv.fit.facility_location` where methods written for version 0.1 import them."""

from lmms_mtv.fit.facility_location import greedy

__all__ = ["greedy"]
