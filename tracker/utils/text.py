"""Names of models and layers in what people read: they are data, and nothing in them steers a terminal or a picture."""

from __future__ import annotations


def plain(text: object) -> str:
    r"""The text with what is no printable character, line breaks aside, written as an escape.

    Examples:
        >>> plain("conv\x1b[2J")
        'conv\\x1b[2J'
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(text))


def in_line(text: object) -> str:
    """The same in one line: a name cannot begin a line of a table that says something else."""
    return plain(text).replace("\n", "\\n")


def in_picture(name: object) -> str:
    """A name for a picture: matplotlib takes what stands between dollars for a formula."""
    return in_line(name).replace("$", r"\$")
