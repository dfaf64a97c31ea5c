"""The commands of ``lmms-mtv``, one file each.

The module of a command has ``add(commands)``, which adds the parser of the command and sets ``run``, a function of the
parsed arguments. All imports beyond the needs of the parser happen when the command runs.
"""
