"""The tables beside embeddings: which images there are, by row, name and ids. Those of others are not believed."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from pyarrow import ArrowException, ArrowInvalid, Table, int64, parquet, string, types

from .dataset_loading import EMBEDDINGS_FILE

# Columns of a labelled data set that travel with the vectors.
KEPT_ID_COLUMNS = ("person_id", "camera_id", "track_id")
_ID_KINDS = (
    types.is_integer,
    types.is_floating,
    types.is_string,
    types.is_large_string,
    types.is_boolean,
    types.is_null,
)
# Largest table of a shard: names are paths, which have no more than 4,096 bytes.
_MAX_ROW_BYTES, _MAX_BATCH_BYTES = 2**14, 2**28


def describe(rows: datasets.Dataset, first: int) -> Table:
    """Row number, name and ids of some images from row `first` on, whose bytes are not read."""
    columns = [column for column in KEPT_ID_COLUMNS if column in rows.column_names]
    plain = rows.select_columns(["image", *columns]).cast_column("image", datasets.Image(decode=False)).flatten()
    plain = plain.select_columns(["image.path", *columns]).with_format("arrow")[:]
    names = [path or f"row {first + i}" for i, path in enumerate(plain["image.path"].to_pylist())]
    # of the data's own types, which a shard with no id in it wouldn't tell
    ids = {column: plain[column] for column in columns}
    return _without_nan(Table.from_pydict({"row": range(first, first + len(rows)), "name": names, **ids}))


def _without_nan(table: Table) -> Table:
    """NaN stands for no id, and isn't equal to itself: null in its place."""
    for place, field in enumerate(table.schema):
        if types.is_floating(field.type):
            column = table[field.name]
            table = table.set_column(place, field.name, pc.if_else(pc.is_nan(column), None, column))
    return table


def id_columns(table: Table) -> dict[str, np.ndarray]:
    """The ids of images by column: whole numbers as integers, however they are stored.

    Args:
        table: With those of the columns person_id, camera_id and track_id that there are.

    Returns:
        {column: (images,)}; of dtype object for strings, and with None where rows have no id (null, NaN).

    Raises:
        ValueError: A column holds neither numbers nor strings.
    """
    table, ids = _without_nan(table), {}
    for name in [name for name in KEPT_ID_COLUMNS if name in table.column_names]:
        column = table[name]
        kind = column.type.value_type if types.is_dictionary(column.type) else column.type
        if not any(is_kind(kind) for is_kind in _ID_KINDS):
            raise ValueError(f"`{name}` holds {column.type}; expected whole numbers or strings as ids.")
        if types.is_floating(column.type):  # as pandas keeps whole numbers with gaps
            try:
                column = column.cast(int64())
            except ArrowInvalid:
                pass  # fractions
        ids[name] = np.array(column.to_pylist(), object) if column.null_count else column.to_numpy()
    return ids


def read_table(file: Path, rows: range) -> Table:
    """What `describe` told of a shard.

    Args:
        file: The one with the vectors, beside the table.
        rows: Rows of the data that may be in it.

    Raises:
        PermissionError: The table may not be read.
        ValueError: It is missing or damaged, or can't be that of these rows.
    """
    misfit = ValueError(f"{file}: its .parquet file doesn't fit {EMBEDDINGS_FILE}. Remove it and embed again.")
    try:
        with parquet.ParquetFile(file.with_suffix(".parquet")) as content:
            told, limit = content.metadata, len(rows) * _MAX_ROW_BYTES
            size = sum(told.row_group(group).total_byte_size for group in range(told.num_row_groups))
            if told.num_rows > len(rows) or size > limit:
                raise misfit
            batches = []
            # few rows at a time: a long text is kept once in the file, however many rows have it
            for batch in content.iter_batches(max(1, _MAX_BATCH_BYTES // (size + 1))):
                limit -= batch.nbytes
                if limit < 0:
                    raise misfit
                batches.append(batch)
            table = Table.from_batches(batches, content.schema_arrow)
    except PermissionError:
        raise
    except (OSError, ArrowException) as error:
        raise ValueError(f"{file}: its .parquet file can't be read ({error}). Remove it and embed again.") from error
    kinds = dict(zip(table.schema.names, table.schema.types, strict=True))
    good = (kinds.get("row"), kinds.get("name")) == (int64(), string())
    if not good or not all(row in rows for row in table["row"].to_pylist()):
        raise misfit
    return _without_nan(table)


def first_change(then: Table, now: Table) -> str | None:
    """The first image that is another now than when it was embedded; None if there is none.

    Args:
        then: As of `read_table`; broken images are missing from it.
        now: As of `describe`, of all images of the shard.
    """
    now = now.take(pc.subtract(then["row"], now["row"][0]))
    if now.equals(then):
        return None
    for before, after in zip(then.to_pylist(), now.to_pylist(), strict=True):
        if before != after:
            names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
            was, is_now = (", ".join(f"{name} {row.get(name)}" for name in names) for row in (before, after))
            return f"row {before['row']} was {was}, now {is_now}"
    return None
