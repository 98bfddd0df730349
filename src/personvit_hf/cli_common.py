"""What the commands share: how they read options and print what files tell."""

from __future__ import annotations

from pathlib import Path

import typer

from .files import printable


def numbers(text: str | None, kind: type = float, separator: str = ",") -> list | None:
    """The numbers of an option such as 0.5,0.5,0.5 or 256x128."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(separator)]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not {kind.__name__} numbers with {separator!r} between.") from None


def absolute(name_or_path: str) -> str:
    """One spelling of a path, from whatever folder it is named; a name on the Hub as it is."""
    path = Path(name_or_path)
    if not path.exists():
        return name_or_path
    # of a link to a file the own name is kept: its ending tells what the file is
    return str(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)


def printable_lines(text: str) -> str:
    """`printable` for each line."""
    return "\n".join(map(printable, text.split("\n")))
