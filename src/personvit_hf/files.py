"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes `output` if all goes well and else leaves nothing behind.

    Args:
        output: What to write. Its parents are made.
        overwrite: Whether to replace an existing file, or a folder that holds nothing but what the new one holds too.

    Raises:
        FileExistsError: if `output` exists and may not be replaced; an empty folder may always be.
    """
    output = Path(os.path.abspath(output))  # "." has a name then
    if output.exists() and not (output.is_dir() and not any(output.iterdir())) and not overwrite:
        raise FileExistsError(
            f"{output} exists already: choose another name, or overwrite it (`--overwrite`, `overwrite=True`)."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        new = work / output.name
        yield new
        _check_replaceable(output, new)
        if new.is_file() or not output.exists():
            new.replace(output)
        else:  # a folder can't be replaced in one step
            output.rename(work / "old")
            try:
                new.rename(output)
            except OSError:
                (work / "old").rename(output)
                raise
    finally:
        shutil.rmtree(work)


def _check_replaceable(output: Path, new: Path) -> None:
    """Raises a FileExistsError if what it holds would be lost."""
    if not output.exists():
        return
    if output.is_dir() != new.is_dir():
        raise FileExistsError(f"{output} is a {'folder' if output.is_dir() else 'file'}: choose another name.")
    others = {path.name for path in output.iterdir()} - {path.name for path in new.iterdir()} if new.is_dir() else ()
    if others:
        raise FileExistsError(f"{output} holds other files, which would be lost: {sorted(others)[:5]}.")
