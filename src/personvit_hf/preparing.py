"""Folders and archives to sharded parquet with the images' own bytes, for `load_dataset` and `push_to_hub`.

Each shard is written beside its place and moved there whole, with what was left out of it in its metadata. So a run
that was killed goes on after the last whole shard, and the report covers all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import filelock
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .file_trees import ARCHIVE_SUFFIXES, FileTree, TarTree, UnreadableFile, is_lmdb
from .files import written_aside
from .person_images import decode_image, image_names, image_trees, luperson_path, resolve_source
from .reid_data import labelled_files
from .reid_layouts import BENCHMARKS, benchmarks_called, require_no_layout, warn_of_missing

logger = logging.getLogger(__name__)

_METADATA = b"personvit"
_GROUP_ROWS = 500  # images in memory at a time, and what a stream reads at a time
_README = """---
configs:
- config_name: {config}
  default: true
  data_files:
{files}---

# {title}

Person images prepared by `personvit data prepare`. The files are as they were in the source, byte by byte; each was
decoded once to see that it can be. The terms of the source hold for this copy, too.

| split | images |
| --- | --- |
{counts}
{summary}
"""


@dataclass
class PrepareReport:
    """What became of every file of the source: read == kept + skipped.

    Attributes:
        kept: Number of images by split.
        skipped: {reason: names} of the files that are in no shard.
        missing: Files that the source's own lists name, but that aren't there.
        new_shards: Number of shards written by this run; the others were there.
    """

    kept: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    new_shards: int = 0

    @property
    def read(self) -> int:
        """Number of files looked at."""
        return sum(self.kept.values()) + sum(map(len, self.skipped.values()))

    def skip(self, reason: str, names: list[str]) -> None:
        """Adds files that were left out."""
        self.skipped.setdefault(reason, []).extend(names)

    def __str__(self) -> str:
        """One line a figure, then one a reason with the first names."""
        kept = sum(self.kept.values())
        lines = [f"read {self.read}, kept {kept}, skipped {self.read - kept}"]
        for reason, names in sorted(self.skipped.items()):
            more = ", ..." if len(names) > 3 else ""
            lines.append(f"  {len(names)} skipped, {reason}: {', '.join(names[:3])}{more}")
        if self.missing:
            more = ", ..." if len(self.missing) > 3 else ""
            names = ", ".join(self.missing[:3]) + more
            lines.append(f"  {len(self.missing)} listed by the source and not there: {names}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Row:
    tree: FileTree
    name: str
    ids: tuple[int, int] | None


def prepare_dataset(
    name_or_path: str | os.PathLike,
    out: str | os.PathLike,
    root: str | os.PathLike | None = None,
    shard_images: int = 10_000,
    progress: bool = False,
) -> PrepareReport:
    """Writes a data set to parquet files `<split>-<number>-of-<count>.parquet`, with README.md and report.json.

    A run that was cut off goes on when it is started again with the same arguments. Files count as the same by name,
    size and time of change (of an archive: its own), so the source may have been moved, or copied with its times.

    Args:
        name_or_path: A benchmark's name or "luperson" with `root`; or a folder or archive: with the columns image,
            person_id and camera_id if it is laid out as Market-1501 or MSMT17, else with the column image.
        out: The folder.
        root: As in `load_reid_dataset` and `load_person_images`.
        shard_images: Files of the source a shard. 10,000 person crops are some 100 MB.
        progress: Whether to show a progress bar.

    Returns:
        The report: every file of the source is kept or skipped for a reason.

    Raises:
        FileNotFoundError, ValueError: As in `load_reid_dataset` and `load_person_images`; or a folder holds a
            Market-1501 or MSMT17 tree or archive, which must be given itself; or `out` holds shards of another source,
            or of this one as it was; or another process is at work in it, or no image can be kept.
        OSError: A shard can't be written, for want of space, say. The message tells how many are whole.

    Warns:
        UserWarning: As in `load_reid_dataset`.
    """
    if shard_images < 1:
        raise ValueError(f"`shard_images` must be 1 or more, got {shard_images}.")
    out = Path(out)
    report = PrepareReport()
    splits = _plan(name_or_path, root, report)
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / ".prepare.lock", timeout=0)
    try:
        with lock:
            _write(splits, out, shard_images, report, progress)
            _finish(str(name_or_path), splits, out, report)
    except filelock.Timeout as error:
        raise ValueError(f"{out}: another process is preparing a data set here; wait for it.") from error
    return report


def _plan(
    name_or_path: str | os.PathLike, root: str | os.PathLike | None, report: PrepareReport
) -> dict[str, list[_Row]]:
    """The rows of each split, in their order; what isn't one of them goes to the report."""
    # Without a root, a path that is there is meant as such: benchmarks lie in folders of their own names.
    is_benchmark = bool(benchmarks_called(name_or_path)) and (
        root is not None or not Path(name_or_path).expanduser().exists()
    )
    if is_benchmark and root is None:
        raise FileNotFoundError(f"{name_or_path}: say where this benchmark lies (root).")
    source = resolve_source(name_or_path) if root is None else None
    if isinstance(source, str):
        raise ValueError(f"{name_or_path}: on the Hub; only folders and archives of this machine are prepared.")
    labelled = None
    if is_benchmark or (source is not None and _may_be_labelled(source)):
        labelled = labelled_files(name_or_path, root)
    if labelled is not None:
        warn_of_missing(labelled)
        report.missing = [name for names in labelled.missing.values() for name in names]
        trees = [labelled.tree]
        splits = {
            split: [_Row(labelled.tree, name, (person, camera)) for name, person, camera in rows]
            for split, rows in labelled.rows.items()
        }
    else:
        trees = image_trees(source if root is None else _luperson(name_or_path, root))
        if root is None:
            require_no_layout(trees)
        splits = {"train": [_Row(tree, name, None) for tree in trees for name in image_names(tree)]}
    taken = {(id(row.tree), row.name) for rows in splits.values() for row in rows}
    for tree in trees:
        for reason, names in tree.skipped.items():
            report.skip(reason, names)
        others = [name for name in tree.names if (id(tree), name) not in taken]
        if others:
            report.skip("no image of a split" if labelled else "no image by its name", others)
        if isinstance(tree, TarTree) and tree.is_compressed:  # can only be read from the front
            for rows in splits.values():
                rows.sort(key=lambda row: row.tree.position(row.name) if row.tree is tree else -1)
    if not any(splits.values()):
        raise ValueError(f"{name_or_path}: no image in it.\n{report}")
    return splits


def _luperson(name: str | os.PathLike, root: str | os.PathLike) -> Path:
    try:
        return luperson_path(name, root)
    except ValueError:  # which tells of LUPerson alone
        known = ", ".join(benchmark.name for benchmark in BENCHMARKS)
        raise ValueError(
            f"{name}: no data set of this name; `root` goes with luperson, {known}, and msmt17 for either version. "
            "Correct the name, or give a path without `root`."
        ) from None


def _may_be_labelled(source: Path) -> bool:
    return not is_lmdb(source) and (source.is_dir() or source.name.lower().endswith(ARCHIVE_SUFFIXES))


def _write(splits: dict[str, list[_Row]], out: Path, shard_images: int, report: PrepareReport, progress: bool) -> None:
    shards = {}
    for split, rows in splits.items():
        count = -(-len(rows) // shard_images)
        for index in range(count):
            part = rows[index * shard_images : (index + 1) * shard_images]
            shards[out / f"{split}-{index:05}-of-{count:05}.parquet"] = (split, part)
    foreign = sorted(file.name for file in out.glob("*.parquet") if file not in shards)
    if foreign:
        raise ValueError(f"{out}: holds shards of another source or size ({foreign[0]}). Choose another folder.")
    for leftover in out.glob(".*.part"):  # of a run that was killed
        leftover.unlink()
    report.kept = dict.fromkeys(splits, 0)
    whole = 0
    with tqdm(total=sum(map(len, splits.values())), unit=" images", disable=not progress) as bar:
        for path, (split, rows) in shards.items():
            skipped = _finished(path, rows)
            if skipped is None:
                try:
                    skipped = _write_shard(path, rows)
                except OSError as error:
                    raise OSError(
                        error.errno,
                        f"{path} can't be written ({error.strerror or error}). {whole} of {len(shards)} shards are "
                        "whole; make room and run the same command again to go on after them",
                    ) from error
                report.new_shards += 1
            whole += 1
            for reason, names in skipped.items():
                report.skip(reason, names)
            report.kept[split] += len(rows) - sum(map(len, skipped.values()))
            bar.update(len(rows))


def _finished(path: Path, rows: list[_Row]) -> dict[str, list[str]] | None:
    """What was skipped in a shard that is there, or None if it must be written."""
    if not path.exists():
        return None
    try:
        found = json.loads(pq.read_metadata(path).metadata[_METADATA])
        fingerprint, skipped = found["rows"], {reason: list(names) for reason, names in found["skipped"].items()}
    except (pa.ArrowInvalid, OSError, TypeError, KeyError, ValueError, AttributeError, RecursionError):
        logger.warning("%s is cut off or damaged; it is written again.", path)
        return None
    if fingerprint != _fingerprint(rows):
        raise ValueError(
            f"{path}: holds other images than the source does now, by their names, sizes or times of change. Choose "
            "another folder, or remove this file to write it again."
        )
    return skipped


def _write_shard(path: Path, rows: list[_Row]) -> dict[str, list[str]]:
    features = {"image": datasets.Image()}
    if rows[0].ids is not None:
        features |= {"person_id": datasets.Value("int64"), "camera_id": datasets.Value("int64")}
    schema = datasets.Features(features).arrow_schema
    skipped: dict[str, list[str]] = {}
    fingerprint = _fingerprint(rows)  # of the source before it is read, so that a change meanwhile is noticed
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            with pq.ParquetWriter(file, schema) as writer:
                for group in _groups(rows, skipped):
                    writer.write_table(pa.Table.from_pylist(group, schema))
                writer.add_key_value_metadata(
                    {_METADATA: json.dumps({"rows": fingerprint, "skipped": skipped}).encode()}
                )
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return skipped


def _groups(rows: list[_Row], skipped: dict[str, list[str]]) -> Iterator[list[dict]]:
    """The good rows, some at a time; the names of the others go to `skipped`."""
    group: list[dict] = []
    for row in rows:
        try:
            content = row.tree.read(row.name)
            decode_image(content, row.name)
        except UnreadableFile as error:
            logger.info("%s", error)
            skipped.setdefault(error.reason, []).append(row.name)
            continue
        values: dict = {"image": {"bytes": content, "path": row.name}}
        if row.ids is not None:
            values |= {"person_id": row.ids[0], "camera_id": row.ids[1]}
        group.append(values)
        if len(group) == _GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group


def _fingerprint(rows: list[_Row]) -> str:
    """Of names, ids, sizes and times, so not of where the source lies: it may be moved."""
    listed = json.dumps([[row.tree.path.name, row.name, row.ids, row.tree.stamp(row.name)] for row in rows])
    return hashlib.sha256(listed.encode()).hexdigest()


def _finish(title: str, splits: dict[str, list[_Row]], out: Path, report: PrepareReport) -> None:
    if not sum(report.kept.values()):
        raise ValueError(f"{out}: none of the images can be kept.\n{report}")
    labelled = any(row.ids is not None for rows in splits.values() for row in rows[:1])
    readme = _README.format(
        config="labelled" if labelled else "unlabelled",
        files="".join(f"  - split: {split}\n    path: {split}-*.parquet\n" for split in splits),
        title=Path(title).name,
        counts="".join(f"| {split} | {count} |\n" for split, count in report.kept.items()),
        summary=str(report).splitlines()[0].capitalize() + "; report.json says why.",
    )
    numbers = {"read": report.read, "kept": report.kept, "skipped": report.skipped, "missing": report.missing}
    for name, text in (("report.json", json.dumps(numbers, indent=1, ensure_ascii=False)), ("README.md", readme)):
        with written_aside(out / name, overwrite=True) as part:
            part.write_text(text, encoding="utf-8")
