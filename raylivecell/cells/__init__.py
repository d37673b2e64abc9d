"""Maps -> cells: the watershed, and what is measured of each cell. No torch, no Ray.

watershed          maps -> label image
measure            label image -> a table with one row per cell
"""
