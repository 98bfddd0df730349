"""Files read by several processes and threads at once: by place, so that none moves another's position.

A file is opened when it is read, and few stay open, however many archives there are.
"""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path

# Far fewer than the files that a process may have open, often 1024.
MAX_OPEN_FILES = 64

State = tuple[int, int]


def size_and_time(path: str | os.PathLike | int) -> State | None:
    """Size in bytes and time of change in ns of a file or descriptor; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:  # such as a link to nothing
        return None
    return status.st_size, status.st_mtime_ns


def read_part(path: Path, state: State, start: int, size: int) -> bytes:
    """`size` bytes of a file from byte `start` on, fewer at its end.

    Args:
        path: The file.
        state: Its `size_and_time` when it was listed.
        start: Where to begin.
        size: How many bytes.

    Raises:
        OSError: It can't be read, or was replaced since.
    """
    return os.pread(_opened(path, state).fileno(), size, start)


class SharedFile:
    """What zipfile needs of a file, with a position of its own: forked processes share the one of a descriptor.

    Args:
        path: The file.
        state: Its `size_and_time`.

    Raises:
        OSError: As `read_part`.
    """

    def __init__(self, path: Path, state: State) -> None:
        self.path, self.state = path, state
        self._position = 0
        _opened(path, state)  # zipfile would take an error of the first read for one of the format

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The next byte to read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to another byte, counted from the start, from here, or from the end."""
        position = (0, self._position, self.state[0])[whence] + offset
        if position < 0:
            raise OSError(f"{self.path}: byte {position} is before the first.")
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        """The next bytes, all for -1."""
        content = read_part(self.path, self.state, self._position, self.state[0] if size < 0 else size)
        self._position += len(content)
        return content


class _File(io.FileIO):
    def __del__(self) -> None:
        self.close()  # left to itself, a FileIO warns


@functools.lru_cache(maxsize=MAX_OPEN_FILES)
def _opened(path: Path, state: State) -> io.FileIO:
    """Closed when it has left the cache and the last read of it is over."""
    file = _File(path)
    if size_and_time(file.fileno()) != state:
        raise OSError(f"{path} was replaced since it was listed")
    return file
