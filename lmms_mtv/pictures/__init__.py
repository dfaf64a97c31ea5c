"""The picture benchmark: drawn pictures of real things, and a frozen language model with eyes that were trained for it.

The pictures are emoji of OpenMoji, the words are real, and the language model is Gemma 3 270M as it was published. Only
the eyes, a small vision encoder and a projector, were trained here.
"""

from pathlib import Path
from typing import Final

EYES: Final = Path(__file__).parent / "eyes"
"""Folder of the trained vision encoder and projector, which ``pretrained=pictures`` puts before the language model."""
