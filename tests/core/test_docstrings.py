"""Help texts from docstrings: no line break of the source survives inside a sentence."""

from raylivecell.core.docstrings import unwrapped
from raylivecell.core.settings import StrictModel


def test_paragraphs_and_entries_become_one_line_each() -> None:
    docstring = """Do one thing
    and another.

    A second paragraph
    of two lines.

    Args:
        first: a description of
            two lines.
        second: a short one.

    Raises:
        ValueError: a reason of
            two lines.
    """
    assert unwrapped(docstring).splitlines() == [
        "Do one thing and another.",
        "",
        "A second paragraph of two lines.",
        "",
        "Args:",
        "    first: a description of two lines.",
        "    second: a short one.",
        "",
        "Raises:",
        "    ValueError: a reason of two lines.",
    ]


class Settings(StrictModel):
    """A model with a field."""

    width: int = 1
    """Width of the
    border in pixels."""


def test_field_descriptions_are_one_line() -> None:
    assert Settings.model_fields["width"].description == "Width of the border in pixels."
