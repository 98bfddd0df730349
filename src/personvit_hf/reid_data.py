"""Labelled re-identification data: file names or parquet rows in, one table per split out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

from .dataset_loading import literal, load_rows, parquet_files, readme_configs, require_own_files, with_image_column
from .file_trees import TarTree, UnreadableFile, given_path, open_tree, warn_of_skipped
from .person_images import resolve_source
from .reid_layouts import (
    MARKET_FOLDERS,
    LabelledFiles,
    benchmarks_called,
    find_benchmark,
    find_layout,
    warn_of_missing,
)

SPLITS = ("train", "query", "gallery")
TEST_SPLITS = ("query", "gallery")  # which all data have; what is for evaluation alone has no others
ID_COLUMNS = ("person_id", "camera_id")


def load_reid_dataset(
    name_or_path: str | os.PathLike, root: str | os.PathLike | None = None, require_train: bool = True
) -> datasets.DatasetDict:
    """A labelled re-identification benchmark.

    Args:
        name_or_path: One of
            - the name of a benchmark that lies at `root`: "market1501", "dukemtmc-reid", "occluded-duke", "msmt17"
              (either version), "msmt17-v1", "msmt17-v2"; case and punctuation don't matter, and the usual names of
              their folders and archives (Market-1501-v15.09.15, Occluded_Duke) do, too;
            - a Market-1501 folder tree: bounding_box_train (or none), query and bounding_box_test with images named
              like 0002_c1s1_000451_03.jpg (person 2, camera 1) or 0005_c2_f0046985.jpg; rows are sorted by file name,
              other files are ignored;
            - an MSMT17 folder tree: list_*.txt beside train and test, or mask_train_v2 and mask_test_v2; the split
              train is list_train.txt and list_val.txt together, if one of them is there;
            - a .zip or .tar archive (also .tar.gz) of such a tree, which is read without being unpacked: its images
              are copied, as they are, to the cache of `datasets` the first time;
            - a folder with parquet files, or a Hub data set "owner/name", with the columns below: its config
              "labelled" if its README defines one, else its default config. A folder without configs is read by file
              names (or subfolders) that start with train (or none do), query and gallery.
        root: Where the benchmark is: its folder or archive, or a folder that holds that under one of its usual names.
        require_train: False for data that need serve evaluation alone: without train it is no key of the result.

    Returns:
        `datasets.DatasetDict` with train, query and gallery, and the columns image (`datasets.Image`), person_id and
        camera_id (int64), then any others the files have. person_id is as in the file: -1 is junk, 0 a distractor.
        MSMT17 numbers people from 0, in train and test anew; here train is 1 to 1041 and test 1042 to 4101.
        camera_id counts from 0 (c1 is camera 0), as models with camera embeddings need it.

    Raises:
        FileNotFoundError: There is no such folder or Hub data set, the benchmark isn't at `root`, or a folder or list
            of the tree is missing.
        ValueError: A split is missing or empty, a file name has no ids, or a column is missing or
            has a wrong type.

    Warns:
        UserWarning: A benchmark's ids, images and cameras are not as many as published, or files that its lists name
            are missing; the warning names them, or says what is known of them.
    """
    if root is None and benchmarks_called(name_or_path) and not Path(name_or_path).expanduser().exists():
        raise FileNotFoundError(
            f"{name_or_path}: no such file or folder. For the benchmark of this name, say where it lies: "
            f"load_reid_dataset({str(name_or_path)!r}, root=...)."
        )
    source, files = resolve_source(name_or_path) if root is None else given_path(root), None
    if isinstance(source, str):
        found = {
            split: require_own_files(rows, source) for split, rows in load_rows(source, config="labelled").items()
        }
    else:
        files = labelled_files(name_or_path, root)
        if files is None:
            found = _local_parquet(source)
        else:
            warn_of_missing(files)
            found = _table(files)
    missing = [split for split in (SPLITS if require_train else TEST_SPLITS) if split not in found]
    if missing:
        problem = f"{name_or_path}: no split {', '.join(missing)}; found {', '.join(found)}."
        if files is None:
            raise ValueError(problem)
        folders = ", ".join(MARKET_FOLDERS[split] for split in missing)
        raise FileNotFoundError(f"{problem} In a Market-1501 tree that is {folders}.")
    splits = [split for split in SPLITS if split in found]
    return datasets.DatasetDict({split: _checked(found[split], f"{name_or_path}, {split}") for split in splits})


def person_labels(person_ids: Iterable[int]) -> dict[int, int]:
    """Class label of each person, in the order of the sorted ids, whatever the order of the rows.

    Args:
        person_ids: Ids as in the data, repeated at will. -1 (junk) and 0 (distractors) are nobody and get no label.

    Returns:
        {person_id: label} with labels 0 to C - 1.

    Raises:
        ValueError: There is no id above 0.
    """
    people = sorted({int(person) for person in person_ids if person > 0})
    if not people:
        raise ValueError("`person_ids` holds no identity: no id above 0.")
    return {person: label for label, person in enumerate(people)}


def num_valid_queries(dataset: datasets.DatasetDict) -> int:
    """How many queries have a true match: a gallery image of the same person (id above 0) by another camera.

    Args:
        dataset: What `load_reid_dataset` returns.
    """
    query, gallery = (
        zip(rows["person_id"][:], rows["camera_id"][:], strict=True) for rows in (dataset["query"], dataset["gallery"])
    )
    cameras: dict[int, set[int]] = {}
    for person, camera in gallery:
        if person > 0:
            cameras.setdefault(person, set()).add(camera)
    return sum(bool(cameras.get(person, set()) - {camera}) for person, camera in query)


def require_true_match(dataset: datasets.DatasetDict, source: str) -> None:
    """Stops before long work whose result could not be scored (`evaluate_reid` raises then).

    Args:
        dataset: What `load_reid_dataset` returns.
        source: Its name, for the message.

    Raises:
        ValueError: No query has a true match.
    """
    if not num_valid_queries(dataset):
        raise ValueError(
            f"{source} can't be scored: none of the {len(dataset['query'])} queries has a true match, a gallery image "
            "with its `person_id` (1 or above) and another `camera_id`. Check that person ids agree between query and "
            "gallery and that camera ids differ."
        )


def labelled_files(name_or_path: str | os.PathLike, root: str | os.PathLike | None = None) -> LabelledFiles | None:
    """The files of a benchmark at `root`, or of a tree or archive at a path; None if the path has no known layout.

    Raises:
        FileNotFoundError, ValueError: As in `load_reid_dataset`.
    """
    if root is not None:
        return find_benchmark(str(name_or_path), given_path(root))
    return find_layout(open_tree(name_or_path))


def _table(files: LabelledFiles) -> dict[str, datasets.Dataset]:
    if files.tree.kind != "folder":
        warn_of_skipped(files.tree)
    tables = {}
    for split, rows in files.rows.items():
        columns = {column: [row[index] for row in rows] for index, column in enumerate(ID_COLUMNS, start=1)}
        if files.tree.kind == "folder":
            columns = {"image": [files.tree.address(name) for name, _, _ in rows], **columns}
            tables[split] = datasets.Dataset.from_dict(columns)
        else:
            tables[split] = _copied(files, rows)
    return tables


def _copied(files: LabelledFiles, rows: list[tuple[str, int, int]]) -> datasets.Dataset:
    """Rows of an archive with their bytes, in a file of the cache that is made once for each state of the archive."""
    tree = files.tree
    order = list(range(len(rows)))
    if isinstance(tree, TarTree) and tree.is_compressed:
        order.sort(key=lambda index: tree.position(rows[index][0]))
    status = tree.path.stat()
    features = {"image": datasets.Image(), **dict.fromkeys(ID_COLUMNS, datasets.Value("int64"))}
    table = datasets.Dataset.from_generator(
        _archive_rows,
        features=datasets.Features(features),
        gen_kwargs={
            "archive": str(tree.path),
            "state": (status.st_size, status.st_mtime_ns),
            "rows": tuple(rows[index] for index in order),
        },
    )
    if order != sorted(order):
        table = table.select(sorted(order, key=order.__getitem__))
    return table


def _archive_rows(
    archive: str, state: tuple[int, int], rows: tuple[tuple[str, int, int], ...]
) -> Iterator[dict[str, Any]]:
    """Rows with the bytes of their images; `state` tells one state of the archive from the next."""
    tree = open_tree(archive)
    for name, person, camera in rows:
        try:
            content = tree.read(name)
        except UnreadableFile as error:  # the row stays, so that its loss shows wherever rows are counted or decoded
            warnings.warn(str(error), stacklevel=2)
            content = b""
        yield {"image": {"bytes": content, "path": name}, "person_id": person, "camera_id": camera}


def _local_parquet(root: Path) -> dict[str, datasets.Dataset]:
    files = [os.path.relpath(file, root) for file in parquet_files(root)]
    if not files:
        raise ValueError(
            f"{root}: neither a Market-1501 tree ({', '.join(MARKET_FOLDERS.values())}), nor one of MSMT17, nor a "
            "folder of parquet files."
        )
    if "labelled" in readme_configs(root):
        return {split: require_own_files(rows, root) for split, rows in load_rows(root, config="labelled").items()}
    by_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for file in files:
        # The innermost name decides: train_data/query-0.parquet is query.
        names = [split for part in reversed(Path(file).parts) for split in SPLITS if part.startswith(split)]
        if names:
            by_split[names[0]].append(literal(root / file))
    absent = [split for split in TEST_SPLITS if not by_split[split]]
    if absent:
        raise ValueError(
            f"{root}: no parquet file or subfolder starts with {', '.join(absent)}; found {', '.join(files)}."
        )
    # One by one: read together they would have to agree in every column, ours or not.
    return {
        split: require_own_files(load_rows("parquet", data_files=paths, split="train"), root)
        for split, paths in by_split.items()
        if paths
    }


def _checked(rows: datasets.Dataset, source: str) -> datasets.Dataset:
    """`rows` with our three columns first and of the right types, or an error that says which isn't."""
    if not len(rows):
        raise ValueError(f"{source}: the split is empty.")
    for column in ID_COLUMNS:
        if column not in rows.column_names:
            raise ValueError(f"{source}: no column `{column}`; found {', '.join(rows.column_names)}.")
        feature = rows.features[column]
        nulls = rows.data.column(column).null_count
        if "int" not in getattr(feature, "dtype", "") or nulls:
            raise ValueError(f"{source}: `{column}` must hold integers; it is {feature} with {nulls} empty rows.")
        if feature != datasets.Value("int64"):
            try:
                rows = rows.cast_column(column, datasets.Value("int64"))
            except ValueError as error:
                raise ValueError(f"{source}: `{column}` must fit into int64: {error}") from error
    rows = with_image_column(rows, source, decode=True)
    first = ["image", *ID_COLUMNS]
    return rows.select_columns(first + [column for column in rows.column_names if column not in first])
