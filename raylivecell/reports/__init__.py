"""HTML reports and overlays. A report is one file without scripts or external resources. No Ray.

page               Jinja2 templates, and the figures and tables that all reports share
overlay            masks and cells drawn on images
pictures           samples next to their segmentations, as PNG
training           report of a training run
evaluation         report of an evaluation
growth_charts, growth_page    growth curves of `predict`, in the layout of the plate
"""
