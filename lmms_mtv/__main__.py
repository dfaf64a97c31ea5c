"""``python -m lmms_mtv``: the command ``lmms-mtv``, also for ``accelerate launch -m``."""

from lmms_mtv.cli import main

main()
