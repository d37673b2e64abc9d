"""U-Net segmentation of living cells in phase-contrast microscopy, trained on Ray.

In a notebook, without a cluster:

    load(uri)              a trained network: its `.segment(image)` finds the cells of uint8 (H, W)
    score(labels, truth)   what that is worth: Dice, mSA, PQ, errors of counts
"""

from typing import TYPE_CHECKING, Any

from raylivecell.core.version import __version__

if TYPE_CHECKING:
    from raylivecell.inference.segmenter import load
    from raylivecell.scoring.scores import score

__all__ = ["__version__", "load", "score"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the command line should not wait for numpy."""
    if name == "load":
        from raylivecell.inference.segmenter import load

        return load
    if name == "score":
        from raylivecell.scoring.scores import score

        return score
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
