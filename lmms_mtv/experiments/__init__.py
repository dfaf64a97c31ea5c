"""Comparisons of tasks x arms x seeds: plans, cells, runs, checks of stored results, and reports."""
