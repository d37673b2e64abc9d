"""Docstrings as help texts: the line breaks of the source are removed, so that a terminal wraps at its own width."""

import inspect
import re

_SECTION = re.compile(r"(Args|Raises|Returns|Yields):")


def unwrapped(docstring: str) -> str:
    """Unwrap `docstring` to one line per paragraph, and one per entry of `Args:`, `Raises:`, `Returns:`.

    Args:
        docstring: in Google style; continuation lines of an entry are indented by more than its first line.
    """
    lines: list[str] = []
    after_break, in_section = True, False
    for line in inspect.cleandoc(docstring).splitlines():
        indent = len(line) - len(line.lstrip())
        header = indent == 0 and _SECTION.fullmatch(line) is not None
        in_section = header or (in_section and indent > 0)
        starts_entry = in_section and indent <= 4
        if after_break or not line or header or starts_entry:
            lines.append(line)
        else:
            lines[-1] += " " + line.strip()
        after_break = not line or header
    return "\n".join(lines)
