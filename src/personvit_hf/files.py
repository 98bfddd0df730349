"""Files and folders that are written whole or not at all, and what is read from files of any origin."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
MAX_YAML_DEPTH = 100


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
        follow_umask(new)
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


def follow_umask(path: Path) -> None:
    """Gives a file, or all files in a folder, the mode of any new file: safetensors writes for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in (path, *path.rglob("*")):
        if file.is_file():
            with suppress(OSError):  # some file systems know no modes
                file.chmod(0o666 & ~mask)


def require_writable(file: Path) -> None:
    """Makes the folders above a file that long work will end with, or says before it why there can be no such file.

    Raises:
        OSError: if the file is a folder, may not be written, or its folder can't be made.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder: give the name of a file.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{file} can't be written, as its folder can't be made ({error}).") from error
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PermissionError(f"{file} may not be written: choose another name.")


def require_writable_folder(folder: Path) -> None:
    """Says before long work why nothing could be written to a folder that may not be there yet; makes nothing.

    Raises:
        OSError: if a file is in its way, or it may not be made or written to.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(f"{folder} can't be a folder, as {there} is none: choose another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} can't be written, as {there} may not be written to: choose another name.")


def _check_replaceable(output: Path, new: Path) -> None:
    """Raises a FileExistsError if what it holds would be lost."""
    if not output.exists():
        return
    if output.is_dir() != new.is_dir():
        raise FileExistsError(f"{output} is a {'folder' if output.is_dir() else 'file'}: choose another name.")
    others = {path.name for path in output.iterdir()} - {path.name for path in new.iterdir()} if new.is_dir() else ()
    if others:
        raise FileExistsError(f"{output} holds other files, which would be lost: {sorted(others)[:5]}.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of any origin; empty if there is no such file.

    Raises:
        ValueError: if it holds no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file of any origin; empty if there is no such file.

    Raises:
        ValueError: if it is no YAML mapping, holds aliases or is nested deeply.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    try:
        text = content.decode()
        require_modest_yaml(text)
        settings = yaml.safe_load(text)
    except Exception as error:  # of many types: yaml wraps few of what its readers of dates and numbers raise
        raise ValueError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected lines `setting: value`, found {type(settings).__name__}.")
    return settings


def printable(line: str) -> str:
    """What files from elsewhere tell, without what would steer a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def require_modest_yaml(text: str) -> None:
    """Raises a ValueError for aliases and deep nesting: a few bytes of YAML would take hours or gigabytes."""
    depth = 0
    for event in yaml.parse(text):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {line}: the alias *{event.anchor}; write out what it stands for")
        depth += isinstance(event, yaml.events.CollectionStartEvent) - isinstance(
            event, yaml.events.CollectionEndEvent
        )
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"line {line}: nested more than {MAX_YAML_DEPTH} deep")


def flush_to_disk(folder: Path) -> None:
    """Waits until a folder and all in it would survive a power cut (fsync)."""
    for path in (*folder.rglob("*"), folder):
        flush_entry(path)


def flush_entry(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_durably(source: Path, target: Path) -> None:
    """Renames a file or folder, and waits until the new name would survive a power cut."""
    source.rename(target)
    flush_entry(target.parent)


def write_manifest(folder: Path) -> None:
    """Writes `manifest.json` with the size and SHA-256 of each file in the folder."""
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")


def check_manifest(folder: Path) -> None:
    """Compares a folder with its `manifest.json`.

    Raises:
        ValueError: if a file is missing, was added or changed, or if there is no manifest that can be read.
    """
    path = folder / MANIFEST
    try:
        if not path.is_file():  # such as a pipe, on which reading would wait
            raise ValueError("no such file")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"larger than {MAX_MANIFEST_BYTES} bytes")
        files = json.loads(path.read_text())["files"]
        expected = {str(name): (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} can't be read ({error})") from error
    found = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    if found != set(expected):
        missing, unexpected = sorted(set(expected) - found), sorted(found - set(expected))
        raise ValueError(f"missing files {missing}, unexpected files {unexpected}")
    for name in sorted(found):
        entry = folder / name
        if not entry.is_file() or entry.stat().st_size != expected[name][0]:
            raise ValueError(f"{name} has not the size of {expected[name][0]} bytes that it was written with")
    for name in sorted(found):
        if _fingerprint(folder / name)["sha256"] != expected[name][1]:
            raise ValueError(f"{name} has changed since it was written (SHA-256)")


def _fingerprint(path: Path) -> dict[str, int | str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}
