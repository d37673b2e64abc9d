"""Network output maps -> cells: the watershed, and measurements of each cell. No torch, no Ray.

watershed          maps -> label image
strips             large images, strip by strip, in bounded memory
measure            label image -> a table with one row per cell
"""
