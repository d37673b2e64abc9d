"""U-Net segmentation of living cells in phase-contrast microscopy, trained on a Ray cluster."""

__version__ = "0.1.0"
