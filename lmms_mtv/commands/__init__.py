"""The commands of ``lmms-mtv``, one file each.

A command's module has ``add(commands)``, which adds its parser and sets ``run``, a function of the parsed arguments.
What a command needs beyond its parser is imported when it runs.
"""
