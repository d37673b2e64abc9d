"""HTML reports and pictures: one file each, no network, no script. No Ray.

page               parts of an HTML page
overlay            masks and cells drawn on images
pictures           a sample next to its segmentation, as PNG
training           the report of a run
evaluation         the report of an evaluation
"""
