"""U-Net segmentation of living cells in phase-contrast microscopy, trained on Ray.

In a notebook, without a cluster:

    load(uri)              load a trained network; `.segment(image)` segments the cells of a uint8 image (H, W)
    score(labels, truth)   compare with the ground truth: Dice, mSA, PQ, count errors
"""

from typing import TYPE_CHECKING, Any

from raylivecell.core.version import __version__

if TYPE_CHECKING:
    from raylivecell.inference.segmenter import load
    from raylivecell.scoring.scores import score

__all__ = ["__version__", "load", "score"]


def __getattr__(name: str) -> Any:
    """Import `load` and `score` on first use, so that the command line does not wait for numpy."""
    if name == "load":
        from raylivecell.inference.segmenter import load

        return load
    if name == "score":
        from raylivecell.scoring.scores import score

        return score
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
