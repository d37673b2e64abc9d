"""Names of the target kinds. The kind NAME is the object `TARGET` of the module raylivecell.targets.NAME."""

import functools
import importlib
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from raylivecell.targets.base import Target

Targets = Literal["foreground", "boundary", "distance"]
"""Values of the recipe's field `targets`."""
NAMES: tuple[Targets, ...] = get_args(Targets)


@functools.cache
def target(name: Targets) -> "Target":
    """Return the kind `name`. Its module is imported on first use: reading a recipe needs no OpenCV."""
    return importlib.import_module(f"{__package__}.{name}").TARGET
