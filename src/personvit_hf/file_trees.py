"""Files of a folder, a zip or tar archive, or an LMDB: listed and read in place, nothing is unpacked.

All of them are untrusted. Nothing is ever written under a member's name, sizes are checked before bytes are read, and
what can't be read safely is listed with the reason.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import printable
from .shared_files import SharedFile, read_part, size_and_time

# Largest file read, in bytes. A person crop has some 10,000.
MAX_FILE_BYTES = 2**26

TAR_SUFFIXES = (".tar",)
COMPRESSED_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
LMDB_SUFFIXES = (".mdb", ".lmdb")
ARCHIVE_SUFFIXES = (".zip", *TAR_SUFFIXES, *COMPRESSED_TAR_SUFFIXES)

_MAX_TAR_HEADER_BYTES = 2**20
_HEADERS_READ_WHOLE = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_MAX_COMPRESSION = 100  # images hardly shrink; deflate's limit is about 1,000
_ADDRESS = re.compile(r"(?:zip|tar|lmdb)://(.+::.+)", re.DOTALL)


class UnreadableFile(ValueError):
    """A file that can't be used; `reason` is one of few fixed phrases, for counting."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class FileTree:
    """What the kinds have in common.

    Attributes:
        path: The folder or file.
        state: Its size in bytes and time of change in ns when it was listed; None where that isn't told.
        names: Files that may be read, sorted; "/" parts folders.
        skipped: Why others may not: {reason: names}.
    """

    kind: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = _state(path)
        self.names: list[str] = []
        self.skipped: dict[str, list[str]] = {}

    def read(self, name: str) -> bytes:
        """Content of a file of `names`.

        Raises:
            UnreadableFile: It is too large, cut off or damaged, or can't be opened.
        """
        raise NotImplementedError

    def stamp(self, name: str) -> tuple[int, int] | None:
        """What tells that a file was replaced without reading it: size in bytes and time of change in ns.

        Of an archive or LMDB its own when it was listed, which has changed if any member has. None where nothing is
        told.
        """
        return self.state

    def address(self, name: str) -> str:
        """Where `read_address` finds the file: a path, or "zip://<member>::<archive>"."""
        return f"{self.kind}://{name}::{self.path}"

    def _skip(self, name: str, reason: str) -> None:
        printable = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        self.skipped.setdefault(reason, []).append(printable)

    def _list_or_skip(self, name: str, reason: str | None) -> None:
        if reason:
            self._skip(name, reason)
        else:
            self.names.append(name)

    def _unreadable(self, name: str, reason: str, error: object = "") -> UnreadableFile:
        return UnreadableFile(f"{self.path}, {name}: {reason}{f': {error}' if str(error) else ''}.", reason)


class FolderTree(FileTree):
    """The files under a folder; links to files and folders are followed, each folder once."""

    kind = "folder"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        prefix = os.path.join(path, "")
        for file in walk_files(path, hidden=True):
            name = file.removeprefix(prefix)
            self._list_or_skip(name, _odd_name(name))
        self.names.sort()

    def read(self, name: str) -> bytes:
        """As in `FileTree`."""
        return read_file(self.path / name)

    def stamp(self, name: str) -> tuple[int, int] | None:
        """As in `FileTree`."""
        return size_and_time(os.path.join(self.path, name))

    def address(self, name: str) -> str:
        """The path."""
        return os.path.join(self.path, name)


class ZipTree(FileTree):
    """The members of a zip archive."""

    kind = "zip"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._zip = zipfile.ZipFile(SharedFile(path, self.state))
            members = self._zip.infolist()
        except OSError:
            raise
        except Exception as error:  # a directory of any bytes: zipfile raises half a dozen types
            raise ValueError(
                f"{path}: no zip archive that can be read, or cut off ({error}). Fetch the file again."
            ) from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            reason = _why_not(member.filename, member.file_size)
            if member.is_dir():
                continue
            if not reason and member.flag_bits & 0x1:
                reason = "encrypted"
            # For other methods zipfile has no bound on what a few bytes unpack to.
            if not reason and member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                reason = "compression method not read here"
            if not reason and stat.S_ISLNK(member.external_attr >> 16):
                reason = "link"
            if not reason and member.filename in self._members:
                reason = "second file of the same name"
            if reason:
                self._skip(member.filename, reason)
            else:
                self._members[member.filename] = member
        self.names = sorted(self._members)

    def read(self, name: str) -> bytes:
        """As in `FileTree`."""
        member = self._members[name]
        try:
            with self._zip.open(member) as file:
                # With a length: without one, zipfile unpacks all there is before it looks at the declared size.
                return file.read(member.file_size)
        except Exception as error:
            raise self._unreadable(name, "cut off or damaged", error) from error


class TarTree(FileTree):
    """The regular files of a tar archive.

    A compressed one can only be read from the front, so read its files in the order of `position`.
    """

    kind = "tar"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.is_compressed = path.name.lower().endswith(COMPRESSED_TAR_SUFFIXES)
        self._places: dict[str, tuple[int, int]] = {}
        try:
            tar = tarfile.open(path, "r:*" if self.is_compressed else "r:", tarinfo=_BoundedTarInfo)
        except OSError:
            raise
        except Exception as error:  # the first header is read here, and of any bytes
            raise ValueError(
                f"{path}: no tar archive that can be read, or cut off ({error}). Fetch the file again."
            ) from error
        try:
            self._list(tar)
        finally:
            if self.is_compressed:
                self._tar = tar
            else:
                tar.close()
        self.names = sorted(self._places)

    def position(self, name: str) -> int:
        """Byte at which the file begins in the unpacked archive."""
        return self._places[name][0]

    def read(self, name: str) -> bytes:
        """As in `FileTree`."""
        start, size = self._places[name]
        try:
            if self.is_compressed:
                self._tar.fileobj.seek(start)
                content = self._tar.fileobj.read(size)
            else:
                content = read_part(self.path, self.state, start, size)
        except Exception as error:
            raise self._unreadable(name, "cut off or damaged", error) from error
        if len(content) < size:
            raise self._unreadable(name, "cut off or damaged", f"{len(content)} of {size} bytes")
        return content

    def _list(self, tar: tarfile.TarFile) -> None:
        file_size = self.path.stat().st_size
        limit = _MAX_COMPRESSION * file_size + 2**28 if self.is_compressed else None
        name, last, refused = "", -1, None
        try:
            while not refused and (member := tar.next()) is not None:
                tar.members = []  # it would keep them all, a kilobyte each
                name = member.name
                if member.size < 0 or member.offset <= last:  # tarfile would go back, and read on for ever
                    refused = "its header leads back to what has been read, as that of no good archive does."
                elif limit is not None and member.offset_data + member.size > limit:
                    refused = f"unpacks to over {_MAX_COMPRESSION} times the archive's size, which images never do."
                elif not member.isdir():
                    self._add(member)
                last = member.offset
            end = getattr(tar, "last_block", b"")
        except (tarfile.TarError, EOFError, OSError) as error:
            end = str(error).encode()
        except Exception as error:  # headers of any bytes: tarfile raises half a dozen types
            raise ValueError(
                f"{self.path}: no tar archive that can be read after {name} ({error}). Fetch the file again."
            ) from error
        if refused:
            raise ValueError(f"{self.path}, {name}: {refused}")
        if end.strip(b"\0") or len(end) < tarfile.BLOCKSIZE:  # two blocks of zeros end a tar
            self._skip(f"everything after {name}", "archive cut off or damaged")

    def _add(self, member: tarfile.TarInfo) -> None:
        name = member.name.removeprefix("./")
        reason = _why_not(name, member.size)
        if member.issym() or member.islnk():
            reason = "link"
        elif not member.isreg() or member.issparse():
            reason = "no regular file"
        elif not reason and name in self._places:
            reason = "second file of the same name"
        if reason:
            self._skip(name, reason)
        else:
            self._places[name] = (member.offset_data, member.size)


class _BoundedTarInfo(tarfile.TarInfo):
    """Refuses headers that tarfile would read into memory whatever their size, and keeps the last block read."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        block = tar.fileobj.read(tarfile.BLOCKSIZE)
        tar.last_block = block
        member = cls.frombuf(block, tar.encoding, tar.errors)
        member.offset = tar.fileobj.tell() - tarfile.BLOCKSIZE
        return member._proc_member(tar)

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADERS_READ_WHOLE and not 0 <= self.size <= _MAX_TAR_HEADER_BYTES:
            raise ValueError(
                f"{tar.name}: a header of {self.size} bytes; more than {_MAX_TAR_HEADER_BYTES} is refused."
            )
        return super()._proc_member(tar)


class LmdbTree(FileTree):
    """The values of an LMDB by their keys, as LUPerson is given out; keys that begin with "__" are no images."""

    kind = "lmdb"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import lmdb
        except ImportError as error:
            raise ImportError(f"{path}: an LMDB needs the package lmdb: pip install 'personvit-hf[lmdb]'.") from error
        self._file = path / "data.mdb" if path.is_dir() else path
        try:
            with self._open() as database:
                self._require_whole(database)
                with database.begin() as transaction, transaction.cursor() as cursor:
                    keys = [bytes(key) for key in cursor.iternext(keys=True, values=False)]
        except lmdb.Error as error:
            raise ValueError(f"{path}: no LMDB that can be read ({error}). Fetch it again.") from error
        for key in keys:
            name = key.decode("utf-8", "surrogateescape")
            reason = "no image" if key.startswith(b"__") else _why_not(name)
            self._list_or_skip(name, reason)
        self.names.sort()

    def read(self, name: str) -> bytes:
        """As in `FileTree`."""
        with self._open() as database, database.begin(buffers=True) as transaction:
            content = transaction.get(name.encode())
            if content is None:
                raise self._unreadable(name, "missing")
            if len(content) > MAX_FILE_BYTES:
                raise self._unreadable(name, "file too large", f"{len(content)} bytes")
            return bytes(content)

    def _require_whole(self, database: Any) -> None:
        """LMDB reads through a mapping of the file: a page behind its end kills the process (SIGBUS)."""
        expected = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
        found = self._file.stat().st_size
        if found < expected:
            raise ValueError(f"{self._file}: an LMDB that is cut off ({found} of {expected} bytes). Fetch it again.")

    def _open(self) -> Any:
        """Opened for each use: LMDB refuses to open a file twice in a process or its forks, and mapping is cheap."""
        import lmdb

        return lmdb.open(
            str(self.path), subdir=self.path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False
        )


def open_tree(path: str | os.PathLike) -> FileTree:
    """The files of a folder, an archive or an LMDB (a folder with data.mdb, or a .mdb or .lmdb file).

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: It is none of these, or can't be read at all.
        ImportError: An LMDB without the package lmdb.
    """
    path = given_path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    name = path.name.lower()
    if is_lmdb(path):
        return LmdbTree(path)
    if path.is_dir():
        return FolderTree(path)
    if name.endswith(".zip"):
        return ZipTree(path)
    if name.endswith(TAR_SUFFIXES + COMPRESSED_TAR_SUFFIXES):
        return TarTree(path)
    raise ValueError(f"{path}: neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)}).")


def given_path(path: str | os.PathLike) -> Path:
    """An absolute path, "~" resolved.

    Raises:
        FileNotFoundError: It is empty, as "$DATA" is without the variable; `Path` makes the current folder of it.
    """
    if not os.fspath(path):
        raise FileNotFoundError("An empty path was given; expected a file or folder. Is a variable not set?")
    return Path(path).expanduser().absolute()


def is_lmdb(path: Path) -> bool:
    """Whether `path` is an LMDB by its names."""
    return (path / "data.mdb").is_file() or (
        path.is_file() and path.suffix.lower() in LMDB_SUFFIXES and path.name != "lock.mdb"
    )


def read_address(address: str | os.PathLike) -> bytes:
    """Content of the file at an `address` of a tree, or at a path.

    Raises:
        UnreadableFile: There is no such file, or it can't be read.
    """
    parts = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if parts is None:
        return read_file(address)
    name, path = _split_address(parts[1])
    try:
        tree = opened_tree(path)
    except (OSError, ValueError) as error:
        raise UnreadableFile(f"{address}: {error}", "can't be opened") from error
    try:
        return tree.read(name)
    except KeyError:
        raise UnreadableFile(f"{address}: the archive has no such file.", "missing") from None


def _split_address(address: str) -> tuple[str, str]:
    """Member and archive of "<member>::<archive>"; either may have "::" in its own name, so what exists decides."""
    places = [match.start() for match in re.finditer("(?=::)", address)]
    splits = [(address[:place], address[place + 2 :]) for place in places]
    return next((split for split in splits if os.path.isabs(split[1]) and os.path.exists(split[1])), splits[-1])


def opened_tree(path: str | os.PathLike) -> FileTree:
    """`open_tree` of an archive or LMDB, which is listed once for each of its states; forks inherit the list.

    Raises:
        As `open_tree`.
    """
    path = os.fspath(path)
    # The position in a compressed tar must not be shared by processes; of others nothing is.
    reader = os.getpid() if path.lower().endswith(COMPRESSED_TAR_SUFFIXES) else None
    return _opened_tree(path, _state(path), reader)


@functools.lru_cache(maxsize=2**14)
def _opened_tree(path: str, state: tuple[int, int] | None, reader: int | None) -> FileTree:
    return open_tree(path)


def read_file(path: str | os.PathLike) -> bytes:
    """Content of a regular file of at most `MAX_FILE_BYTES`.

    Raises:
        UnreadableFile: It is none, is larger, or can't be opened.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile(f"{path}: no regular file.", "no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise UnreadableFile(f"{path}: {status.st_size} bytes, more than {MAX_FILE_BYTES}.", "file too large")
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableFile(f"{path}: can't be opened: {error.strerror}.", "can't be opened") from error


def _state(path: str | os.PathLike) -> tuple[int, int] | None:
    """Size and time of a file, or of an LMDB's in its folder."""
    return size_and_time(os.path.join(path, "data.mdb")) or size_and_time(path)


def walk_files(root: Path, hidden: bool = False) -> Iterable[str]:
    """Paths of the files under `root`. Links to folders are followed, each real folder once.

    Args:
        root: Folder.
        hidden: Whether hidden files and those in hidden folders are among them.

    Raises:
        OSError: A folder can't be read.
    """

    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over the folder without a word

    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if hidden or not name.startswith("."))
        yield from (os.path.join(folder, name) for name in files if hidden or not name.startswith("."))


def _why_not(name: str, size: int | None = None) -> str | None:
    """The reason not to read an archive's member of this name and size in bytes, or None."""
    if name.startswith("/") or "\\" in name or ".." in name.split("/") or re.match(r"[A-Za-z]:", name):
        return "unsafe name"
    if any(ord(character) < 32 for character in name):
        return "unsafe name"
    if size is not None and size > MAX_FILE_BYTES:
        return "file too large"
    return _odd_name(name)


def _odd_name(name: str) -> str | None:
    """The reason not to read a file of this name from anywhere, or None."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "name not UTF-8"
    parts = name.split("/")
    return "hidden file" if "__MACOSX" in parts or any(part[:1] == "." != part for part in parts) else None


def warn_of_skipped(tree: FileTree) -> None:
    """Warns once of what a tree passes over, counted by reason with the first name of each; not of hidden files."""
    told = {reason: names for reason, names in tree.skipped.items() if reason not in ("hidden file", "no image")}
    if told:
        counts = "; ".join(f"{len(names)} x {reason} ({printable(names[0])})" for reason, names in told.items())
        warnings.warn(f"{tree.path}: passed over {counts}.", stacklevel=3)
