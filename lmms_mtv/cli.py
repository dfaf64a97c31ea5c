"""The command ``lmms-mtv``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lmms-mtv", description="Multimodal Task Vectors for lmms-eval.")
    parser.add_argument("--version", action="version", version=f"lmms-mtv {version('lmms-mtv')}")
    parser.parse_args(arguments)
    parser.print_help()
