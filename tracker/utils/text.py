"""Names of models and layers in what people read: they are data, and nothing in them steers a terminal or a picture."""

from __future__ import annotations

import re


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


def short(text: object, most: int = 60) -> str:
    """The same in one line of at most `most` characters: of longer ones the middle goes.

    Examples:
        >>> short("encoder.layers.0.attention", 16)
        'encoder…ttention'
    """
    line = in_line(text)
    if len(line) <= most:
        return line
    half = (most - 1) // 2
    return f"{line[:half]}…{line[len(line) - (most - 1 - half) :]}"


def fitting(text: object, most: int = 80) -> str:
    """One line in which every word longer than `most` characters (a name) is shortened in its middle."""
    return re.sub(rf"(?!-+$)\S{{{most + 1},}}", lambda found: short(found[0], most), in_line(text))
