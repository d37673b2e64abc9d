"""HTML reports and pictures. Each is one file that loads nothing and runs no script. No Ray.

page               Jinja2 templates, and the figures and tables that all reports share
overlay            draws masks and cells on images
pictures           a sample next to its segmentation, as PNG
training           report of a training run
evaluation         report of an evaluation
"""
