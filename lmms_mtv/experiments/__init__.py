"""Comparisons: tasks x arms x seeds, what they gave, and whether it still holds."""
