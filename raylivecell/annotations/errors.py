"""Errors of annotation files."""

from raylivecell.core.errors import UserError


class AnnotationError(UserError):
    """A damaged or unsupported annotation file. One line: the cause, then the fix."""
