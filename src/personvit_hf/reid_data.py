"""Labelled re-identification data: file names or parquet rows in, one table per split out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import datasets

from .person_images import IMAGE_SUFFIXES, load_rows, resolve_source, walk_files, with_image_column

SPLITS = ("train", "query", "gallery")
MARKET_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
ID_COLUMNS = ("person_id", "camera_id")

_MARKET_NAME = re.compile(r"(-1|\d+)_c([1-9]\d*)")


def load_reid_dataset(name_or_path: str | os.PathLike) -> datasets.DatasetDict:
    """A labelled re-identification benchmark.

    Args:
        name_or_path: One of
            - a Market-1501 folder tree: bounding_box_train, query and bounding_box_test with images named like
              0002_c1s1_000451_03.jpg (person 2, camera 1); rows are sorted by file name, other files are ignored;
            - a folder with parquet files, or a Hub data set "owner/name", with the columns below: its config
              "labelled" if its README defines one, else its default config. A folder without configs is read by file
              names (or subfolders) that start with train, query and gallery.

    Returns:
        `datasets.DatasetDict` with train, query and gallery, and the columns image (`datasets.Image`), person_id and
        camera_id (int64), then any others the files have. person_id is as in the file: -1 is junk, 0 a distractor.
        camera_id of a Market-1501 tree counts from 0 (c1 is camera 0), as models with camera embeddings need it.

    Raises:
        FileNotFoundError: There is no such folder or Hub data set, or a folder of the Market-1501 tree is missing.
        ValueError: A split is missing or empty, a file name has no ids, or a column is missing or has a wrong type.
    """
    source = resolve_source(name_or_path)
    if isinstance(source, str):
        found = load_rows(source, config="labelled")
    elif any((source / MARKET_FOLDERS[split]).is_dir() for split in ("train", "gallery")):  # "query" may hold parquet
        found = {split: _market_split(source, folder) for split, folder in MARKET_FOLDERS.items()}
    else:
        found = _local_parquet(source)
    missing = [split for split in SPLITS if split not in found]
    if missing:
        raise ValueError(
            f"{name_or_path}: no split {', '.join(missing)}; found {', '.join(found)}. Expected {', '.join(SPLITS)}."
        )
    return datasets.DatasetDict({split: _checked(found[split], f"{name_or_path}, {split}") for split in SPLITS})


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


def _market_split(root: Path, folder_name: str) -> datasets.Dataset:
    folder = root / folder_name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; a Market-1501 tree has {', '.join(MARKET_FOLDERS.values())}."
        )
    names = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".")
    )
    if not names:
        raise ValueError(f"{folder}: no image in it.")
    columns: dict[str, list] = {"image": [], "person_id": [], "camera_id": []}
    for name in names:
        ids = _MARKET_NAME.match(name)
        if ids is None:
            raise ValueError(
                f"{folder / name}: no ids in the file name; expected <person>_c<camera>..., such as "
                "0002_c1s1_000451_03.jpg, with person -1, 0 or above and camera 1 or above."
            )
        columns["image"].append(str(folder / name))
        columns["person_id"].append(int(ids[1]))
        columns["camera_id"].append(int(ids[2]) - 1)
    return datasets.Dataset.from_dict(columns)


def _local_parquet(root: Path) -> dict[str, datasets.Dataset]:
    files = [os.path.relpath(file, root) for file in walk_files(root) if file.endswith(".parquet")]
    if not files:
        raise ValueError(
            f"{root}: neither a Market-1501 tree ({', '.join(MARKET_FOLDERS.values())}) nor a folder of parquet files."
        )
    if "labelled" in datasets.get_dataset_config_names(str(root)):
        return load_rows(str(root), config="labelled")
    by_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for file in sorted(files):
        # The innermost name decides: train_data/query-0.parquet is query.
        names = [split for part in reversed(Path(file).parts) for split in SPLITS if part.startswith(split)]
        if names:
            by_split[names[0]].append(str(root / file))
    absent = [split for split, paths in by_split.items() if not paths]
    if absent:
        raise ValueError(
            f"{root}: no parquet file or subfolder starts with {', '.join(absent)}; found {', '.join(sorted(files))}."
        )
    # One by one: read together they would have to agree in every column, ours or not.
    return {split: load_rows("parquet", data_files=paths, split="train") for split, paths in by_split.items()}


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
            rows = rows.cast_column(column, datasets.Value("int64"))
    rows = with_image_column(rows, source, decode=True)
    first = ["image", *ID_COLUMNS]
    return rows.select_columns(first + [column for column in rows.column_names if column not in first])
