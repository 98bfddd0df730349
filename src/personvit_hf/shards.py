"""Images in parquet or WebDataset shards, here, on the Hub or behind https, read through `datasets` from any piece."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from .dataset_loading import literal, load_arguments
from .file_trees import open_tree, walk_files
from .person_images import IMAGE_SUFFIXES, resolve_source, selection_settings

PARQUET_SUFFIX = ".parquet"
STREAMED_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

_URL = re.compile(r"(https?|hf|s3|gs|file)://.+")
_BRACES = re.compile(r"(.*?)\{(\d+)\.\.(\d+)\}(.*)")
_COUNTS_FILE = "sizes.json"
_READ_ROWS = 100
_FIRST_SAMPLES = 5
# The files of a sample that may be its image. `datasets` would look for the endings of the first samples alone.
_TAR_IMAGES = datasets.Features(
    {
        ending: datasets.Image(decode=False)
        for suffix in IMAGE_SUFFIXES
        for ending in (suffix[1:], suffix[1:].upper(), suffix[1:].title())
    }
)


@dataclass(frozen=True)
class Piece:
    """Rows that are read in one go: a row group of a parquet file, or a whole tar file.

    Attributes:
        file: Which of the data set's files it is in.
        group: Which of the file's row groups it is; None for a whole file.
        first_row: The number, in the whole data set, of its first row.
        file_row: The number, in the file, of its first row.
        num_rows: How many rows it has.
    """

    file: int
    group: int | None
    first_row: int
    file_row: int
    num_rows: int


class ShardedImages:
    """Encoded images in shards, read from the front of any piece.

    Args:
        name: What errors call the data set.
        rows: `datasets` stream over the files, one shard a file, with columns of undecoded images, of which a row has
            one.
        files: Their names.
        groups: By file, the rows of each of its row groups; or its number of rows, where it has none.

    Raises:
        ValueError: There are no rows.
    """

    def __init__(
        self, name: str, rows: datasets.IterableDataset, files: list[str], groups: list[list[int] | int]
    ) -> None:
        self.name, self.rows, self.files = name, rows, files
        self.pieces: list[Piece] = []
        first = 0
        for file, counts in enumerate(groups):
            file_row = 0
            for group, count in enumerate([counts] if isinstance(counts, int) else counts):
                if count:
                    self.pieces.append(
                        Piece(file, None if isinstance(counts, int) else group, first + file_row, file_row, count)
                    )
                file_row += count
            first += file_row
        self.num_rows = first
        self._groups = [1 if isinstance(counts, int) else len(counts) for counts in groups]
        self._opened: dict[int, datasets.IterableDataset] = {}
        if not self.num_rows:
            raise ValueError(f"{name}: no rows in its {len(files)} shards.")

    def __len__(self) -> int:
        """Number of images, broken ones included."""
        return self.num_rows

    def read(self, piece: Piece, start: int, stop: int) -> Iterator[Any]:
        """Rows `start` to `stop` of a piece: dicts with bytes and path, as of `datasets.Image(decode=False)`.

        Raises:
            ValueError: The shard can't be read, or ends before `stop`.
        """
        count = 0
        try:
            rows, skip = self._open(piece)
            # `iter`, since iterating a `datasets` stream in a worker would leave out what it takes for other workers'
            batches = rows.skip(skip + start).iter(batch_size=_READ_ROWS) if skip + start else rows.iter(_READ_ROWS)
            for image in islice((image for batch in batches for image in _images(batch)), stop - start):
                count += 1
                yield image
        except GeneratorExit:
            raise
        except Exception as error:  # of the network, of pyarrow, of tarfile
            raise ValueError(f"{self.files[piece.file]}: this shard can't be read: {error}") from error
        if count < stop - start:
            raise ValueError(
                f"{self.files[piece.file]}: has fewer rows than when they were counted, or than {_COUNTS_FILE} says. "
                "Fetch it again, or correct the count."
            )

    def _open(self, piece: Piece) -> tuple[datasets.IterableDataset, int]:
        """A stream with the piece in it, and how many rows come before the piece."""
        if piece.file not in self._opened:
            _require_modest_tar(self.files[piece.file])
            file = self.rows.shard(len(self.files), piece.file)
            self._opened[piece.file] = file.reshard() if self._groups[piece.file] > 1 else file
        file = self._opened[piece.file]
        if piece.group is not None and file.num_shards == self._groups[piece.file] > 1:
            return file.shard(file.num_shards, piece.group), 0
        return file, piece.file_row  # releases of `datasets` that can't part a file into row groups


def load_person_stream(name_or_path: str | Path) -> ShardedImages:
    """Unlabelled person images in shards, to be streamed.

    Args:
        name_or_path: One of
            - a folder with parquet files (its config "unlabelled" if its README defines one, split `train`) or with
              tar files as WebDataset writes them; or one such file;
            - a Hub data set "owner/name" of either kind;
            - an address of either kind of files: https://..., hf://datasets/owner/name/..., s3://...; numbers in
              braces stand for many (https://host/part-{00000..00417}.tar), and * too where there are folders.
            Parquet has the column `image`; a WebDataset sample one file jpg, jpeg, png, bmp or webp.

    Returns:
        The shards, their rows counted. Parquet says how many it has; the samples of a tar file are counted by reading
        it, unless sizes.json beside the files says it ({"part-00000.tar": 10000, ...}, as OpenCLIP reads it).

    Raises:
        FileNotFoundError: There is no such path, address or data set.
        ValueError: It has no shards, or no images in them.
    """
    name = str(name_or_path)
    source, config, options = _locate(name)
    try:
        source, config, found = load_arguments(source, config)
        options |= found
        builder = datasets.load_dataset_builder(source, config, **options)
        files = [str(file) for file in (builder.config.data_files or {}).get("train", ())]
    except Exception as error:  # a missing file, a missing repository, no network, a README of any content
        raise FileNotFoundError(f"{name}: no shards there that can be reached: {error}") from error
    is_parquet = all(file.lower().endswith(PARQUET_SUFFIX) for file in files)
    if not files or not (is_parquet or all(file.lower().endswith(STREAMED_TAR_SUFFIXES) for file in files)):
        raise ValueError(
            f"{name}: expected parquet files, or tar files of WebDataset, in a split train; found "
            f"{Path(files[0]).name if files else 'none'}. `personvit data prepare` makes parquet of folders."
        )
    groups = _parquet_groups(files) if is_parquet else None
    if not is_parquet:
        options["features"] = _TAR_IMAGES
        for file in files[:_FIRST_SAMPLES]:
            _require_modest_tar(file)
    try:
        rows = datasets.load_dataset(source, config, split="train", streaming=True, **options)
        first = [] if is_parquet else list(_images(next(rows.iter(_FIRST_SAMPLES), {})))
    except Exception as error:  # tarfile's, say
        raise ValueError(f"{name}: its shards, such as {files[0]}, can't be read: {error}") from error
    if rows.num_shards != len(files):
        raise ValueError(f"{name}: {len(files)} files make {rows.num_shards} shards; expected one shard a file.")
    if is_parquet:
        rows = _image_column(rows, name)
    elif first and not any(first):
        raise ValueError(
            f"{name}: no image in its first {len(first)} samples; expected one file {', '.join(IMAGE_SUFFIXES)} in "
            "each, with no other dot in its name."
        )
    return ShardedImages(name, rows, files, groups or _tar_counts(files, rows))


def _locate(name: str) -> tuple[Path | str, str | None, dict[str, Any]]:
    """Arguments for `datasets.load_dataset`: what to load, config to prefer, and data_files."""
    if _URL.fullmatch(name):
        addresses = _expand_braces(name)
        if addresses[0].lower().endswith(PARQUET_SUFFIX):
            return "parquet", None, {"data_files": {"train": addresses}}
        if addresses[0].lower().endswith(STREAMED_TAR_SUFFIXES):
            return "webdataset", None, {"data_files": {"train": addresses}}
        raise ValueError(f"{name}: an address must end in .parquet or .tar.")
    source = resolve_source(name)
    if isinstance(source, str):
        return source, "unlabelled", {}
    files = [str(source)] if source.is_file() else sorted(walk_files(source))
    if any(file.lower().endswith(PARQUET_SUFFIX) for file in files):
        if source.is_dir():
            return source, "unlabelled", {}
        if selection_settings(source) is not None:
            raise ValueError(
                f"{name}: an index of `personvit data select` can't be streamed; read it without streaming."
            )
        return "parquet", None, {"data_files": {"train": [literal(source)]}}
    tars = [file for file in files if file.lower().endswith(STREAMED_TAR_SUFFIXES)]
    if not tars:
        raise ValueError(
            f"{name}: no parquet and no tar file in it; `personvit data prepare` makes parquet of folders."
        )
    return "webdataset", None, {"data_files": {"train": [literal(file) for file in tars]}}


def _expand_braces(address: str) -> list[str]:
    match = _BRACES.fullmatch(address)
    if match is None:
        return [address]
    before, low, high, after = match.groups()
    if int(high) < int(low):
        raise ValueError(f"{address}: {{{low}..{high}}} holds no number.")
    numbers = (str(number).zfill(len(low)) for number in range(int(low), int(high) + 1))
    return [before + number + rest for number in numbers for rest in _expand_braces(after)]


def _image_column(rows: datasets.IterableDataset, name: str) -> datasets.IterableDataset:
    """Only the column of images, undecoded; under its own name, since renaming would decode and encode them."""
    columns = rows.column_names or []
    pictures = [column for column in columns if f".{column.lower()}" in IMAGE_SUFFIXES]
    if "image" in columns:
        pictures = ["image"]
    if len(pictures) != 1:
        raise ValueError(f"{name}: no column `image` and not one of {IMAGE_SUFFIXES}; found {', '.join(columns)}.")
    feature = rows.features[pictures[0]]
    encoded = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    if not isinstance(feature, datasets.Image) and feature != encoded:
        raise ValueError(f"{name}: column `{pictures[0]}` holds {feature}, not images.")
    return rows.select_columns(pictures).cast_column(pictures[0], datasets.Image(decode=False))


def _images(batch: dict[str, list[Any]]) -> Iterator[Any]:
    """The image of each row, from whichever column has it; None where none does.

    Raises:
        ValueError: A row has several.
    """
    for row in zip(*batch.values(), strict=True):
        found = [image for image in row if image is not None]
        if len(found) > 1:
            raise ValueError(f"a sample of several images: {', '.join(image['path'] for image in found)}")
        yield found[0] if found else None


def _parquet_groups(files: list[str]) -> list[list[int]]:
    """By file, the rows of each row group, from its last bytes."""

    def count(file: str) -> list[int]:
        try:
            with fsspec.open(file, "rb") as content:
                metadata = pq.read_metadata(content)
        except (OSError, pa.ArrowInvalid, ValueError) as error:
            raise ValueError(f"{file}: no parquet file that can be read, or cut off: {error}") from error
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(count, files))


def _require_modest_tar(file: str) -> None:
    """Raises a ValueError if a tar file on this machine tells of files that `datasets` would fill the memory with."""
    if not file.lower().endswith(STREAMED_TAR_SUFFIXES) or not os.path.isfile(file):
        return
    skipped = open_tree(file).skipped
    for reason in ("file too large", "no regular file"):  # sparse ones claim terabytes in a few bytes
        if reason in skipped:
            raise ValueError(f"{file}, {skipped[reason][0]}: {reason}. Pack the shard without it.")


def _tar_counts(files: list[str], rows: datasets.IterableDataset) -> list[int]:
    """The number of samples in each file: from sizes.json, or by reading what isn't in it."""
    told: dict[str, int] = {}
    for folder in sorted({file.rpartition("/")[0] for file in files}):
        try:
            with fsspec.open(f"{folder}/{_COUNTS_FILE}", "rb") as content:
                found = json.loads(content.read(2**24))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            told |= {f"{folder}/{name}": count for name, count in found.items() if type(count) is int and count >= 0}
    unknown = [file for file in files if file not in told]
    if any(_URL.fullmatch(file) for file in unknown):
        warnings.warn(
            f"{len(unknown)} tar files are read to count their samples; {_COUNTS_FILE} beside them would tell.",
            stacklevel=3,
        )
    for index, file in enumerate(files):
        if file not in told:
            _require_modest_tar(file)
            try:
                batches = rows.shard(len(files), index).iter(batch_size=_READ_ROWS)
                told[file] = sum(1 for batch in batches for _ in _images(batch))
            except Exception as error:  # of the network, or tarfile's
                raise ValueError(f"{file}: no tar file that can be read, or cut off: {error}") from error
    return [told[file] for file in files]
