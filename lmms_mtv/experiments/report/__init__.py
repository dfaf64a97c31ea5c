"""Results of ``lmms-mtv compare`` as tables, pictures and a page.

``results`` reads a folder, ``summary`` makes figures of its cells, ``bootstrap`` intervals of their differences;
``tables`` writes Markdown, ``marks`` puts it into other texts, ``plots`` draws (the only package here that needs
matplotlib), ``page`` makes one HTML page of all.
"""
