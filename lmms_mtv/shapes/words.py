"""The vocabulary of the shapes benchmark: the attributes of a scene, and their values in two languages."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

Attribute = str
"""One of ``color``, ``shape``, ``background``, ``position``: the fields of a scene that a task can ask for."""

LANGUAGES: Final = MappingProxyType({"en": "English", "es": "Spanish"})

SPANISH: Final = MappingProxyType(
    {
        "color": MappingProxyType(
            {
                "red": "rojo",
                "green": "verde",
                "blue": "azul",
                "yellow": "amarillo",
                "purple": "morado",
                "orange": "naranja",
            }
        ),
        "shape": MappingProxyType(
            {
                "circle": "círculo",
                "square": "cuadrado",
                "triangle": "triángulo",
                "cross": "cruz",
                "ring": "anillo",
                "diamond": "rombo",
            }
        ),
        "background": MappingProxyType(
            {
                "black": "negro",
                "white": "blanco",
                "gray": "gris",
                "brown": "marrón",
                "pink": "rosa",
                "teal": "turquesa",
            }
        ),
        "position": MappingProxyType(
            {
                "left": "izquierda",
                "right": "derecha",
                "top": "arriba",
                "bottom": "abajo",
                "center": "centro",
            }
        ),
    }
)
"""Spanish name of every English value, by attribute. No word occurs twice, in either language."""

ATTRIBUTES: Final[tuple[Attribute, ...]] = tuple(SPANISH)

LABELS: Final = MappingProxyType(
    {
        "position": ("dax", "wug", "blick", "toma", "fep"),
        "shape": ("zup", "kiki", "bova", "mipen", "gazzer", "lorp"),
    }
)
"""Made-up words of the hard tasks, one for each value of the attribute."""


def values(attribute: Attribute) -> tuple[str, ...]:
    """Return the English names of the values of ``attribute``, in a fixed order."""
    return tuple(SPANISH[attribute])


def name(attribute: Attribute, value: str, language: str) -> str:
    """Return the name of ``value`` of ``attribute`` in ``language`` (``en`` or ``es``)."""
    return value if language == "en" else SPANISH[attribute][value]
