"""Runs that take longer than a test: the reference results, and what things cost."""
