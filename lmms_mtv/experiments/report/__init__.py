"""Reports of the results of ``lmms-mtv compare``: tables, plots and an HTML page.

``results`` reads a results folder. ``summary`` computes numbers from cells, and ``bootstrap`` computes intervals of
differences. ``tables`` makes the tables, ``marks`` inserts tables into other texts, ``plots`` draws the plots, and
``page`` puts tables and plots into one HTML page. Only ``plots`` and ``page`` need matplotlib.
"""
