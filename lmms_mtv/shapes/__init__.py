"""The embedded benchmark: drawn scenes, a tiny vision-language model, and the script that trains the model."""

from pathlib import Path
from typing import Final

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
"""Folder of the bundled checkpoint, which ``pretrained=tiny`` loads."""
