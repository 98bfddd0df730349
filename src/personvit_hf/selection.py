"""Which images to pre-train on: a score for each, near-duplicates left out, and an index of the rest; copies nothing.

`load_person_images` (and so `examples/pretrain.py --data`) takes the index in place of the data.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .embedding import EmbeddingFolder
from .files import require_writable, written_aside
from .person_images import SELECTION_METADATA, require_no_index
from .search import ExactIndex

SELECTION_RULES = ("cfs", "random")
_BLOCK_IMAGES = 1024


@dataclass(frozen=True)
class Selection:
    """What was decided for each image of a data set; all arrays have one entry an image.

    Attributes:
        scores: float32; the lowest are kept. NaN for broken images.
        duplicate_of: int64; the kept or better image that it nearly repeats, or -1.
        kept: bool.
        names: File names, where they are known.
    """

    scores: np.ndarray
    duplicate_of: np.ndarray
    kept: np.ndarray
    names: list[str | None]

    def __str__(self) -> str:
        """The counts: images == kept + broken + near-duplicates + the rest, whose scores are too high."""
        broken, repeated = int(np.isnan(self.scores).sum()), int((self.duplicate_of >= 0).sum())
        kept, total = int(self.kept.sum()), len(self.kept)
        return (
            f"{total} images: kept {kept}, left out {broken} broken, {repeated} near-duplicates and "
            f"{total - kept - broken - repeated} with higher scores"
        )


def forgetting_scores(generic: np.ndarray, adapted: np.ndarray) -> np.ndarray:
    """The catastrophic forgetting score of each image: how far adapting a model to people moves the image's feature.

    1 - cosine of the two features. It is low where the generic model sees the image as the adapted one does: such
    images are near to the data that the model was adapted to. High scores tell images that are unlike them. The
    adapted model must have been trained from the generic one: features of unrelated models have no common axes.

    Args:
        generic: float32 (images, dim), rows of length 1: of the model before.
        adapted: The same, of that model after fine-tuning for re-identification.

    Returns:
        float32 (images,), from 0 to 2.

    Raises:
        ValueError: The shapes differ.

    In a pool of 2,429 images, a model fine-tuned on 10 people of MOTChallenge 2015 put into the lower half: 81% of
    that set's crops, 77% of crops of another video, 43% of pieces of its background, and 9% of rendered people.

    Source: the idea and the name are TransReID-SSL's (Luo et al., arXiv 2111.12084), which halves LUPerson so; the
        cosine is this package's choice of a distance.
    """
    if generic.shape != adapted.shape:
        raise ValueError(
            f"Features of the generic model are {generic.shape}, of the adapted one {adapted.shape}: it must be the "
            "same architecture, fine-tuned from the generic model, on the same images."
        )
    return (1 - np.einsum("ij,ij->i", generic, adapted)).astype(np.float32)


def near_duplicates(embeddings: np.ndarray, threshold: float, order: np.ndarray) -> np.ndarray:
    """Images that nearly repeat an earlier one, found exactly: the work grows with images x kept images.

    Features are compared around their mean: those of fine-tuned models may all point the same way, with cosines over
    0.99. Of MOTChallenge 2015's tracks the median similarity is 0.96 a frame apart, and 0.76 a second apart.

    Args:
        embeddings: float32 (images, dim), rows of length 1.
        threshold: Cosine similarity from which on two images are the same, such as 0.95.
        order: int64 (images,); an image earlier in this order is preferred.

    Returns:
        int64 (images,): the image that each one repeats, which is never a repetition itself; -1 for the others.

    Raises:
        ValueError: The threshold is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"Near-duplicates are told by a cosine similarity in (0, 1], got {threshold}.")
    if len(embeddings) > 1:
        embeddings = embeddings - embeddings.mean(axis=0)
        embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    repeated = np.full(len(embeddings), -1, np.int64)
    first = np.empty_like(embeddings)  # embeddings of those that repeat none, in order
    originals = np.empty(len(embeddings), np.int64)
    count = 0
    for start in range(0, len(order), _BLOCK_IMAGES):
        block = order[start : start + _BLOCK_IMAGES]
        if count:
            nearest, similarity = ExactIndex(first[:count], {}).search(embeddings[block], 1)
            same = similarity[:, 0] >= threshold
            repeated[block[same]] = originals[nearest[same, 0]]
            block = block[~same]
        among = embeddings[block] @ embeddings[block].T >= threshold
        new = np.ones(len(block), bool)
        for i in range(len(block)):
            if new[i]:
                same = among[i] & new
                same[: i + 1] = False
                repeated[block[same]] = block[i]
                new &= ~same
        block = block[new]
        first[count : count + len(block)], originals[count : count + len(block)] = embeddings[block], block
        count += len(block)
    return repeated


def check_rules(by: str, keep: float, generic: Any, adapted: Any, near_duplicate: float | None) -> None:
    """Stops before features are made that `select_images` could not use.

    Args:
        by: As in `select_images`, as are the others.
        keep: A share.
        generic: Anything that stands for the features, or None if there will be none.
        adapted: The same.
        near_duplicate: A cosine similarity, or None.

    Raises:
        ValueError: Features are missing, or a number is out of range.
    """
    if by not in SELECTION_RULES:
        raise ValueError(f"`by` must be one of {', '.join(SELECTION_RULES)}, got {by!r}.")
    if not 0 < keep <= 1:
        raise ValueError(f"`keep` must be a share in (0, 1], got {keep}.")
    if by == "cfs" and (generic is None or adapted is None):
        raise ValueError("Selection by cfs needs features of two models, `generic` and `adapted`.")
    if near_duplicate is not None and adapted is None:
        raise ValueError("Near-duplicates are told by the features of a model: give `adapted`.")
    if near_duplicate is not None and not 0 < near_duplicate <= 1:
        raise ValueError(f"Near-duplicates are told by a cosine similarity in (0, 1], got {near_duplicate}.")


def select_images(
    num_images: int,
    by: str,
    keep: float,
    generic: EmbeddingFolder | None = None,
    adapted: EmbeddingFolder | None = None,
    near_duplicate: float | None = None,
    seed: int = 0,
) -> Selection:
    """Chooses images of a data set.

    Near-duplicates go first, of which the one with the lowest score stays; then the lowest scores are kept.

    Args:
        num_images: Of the data set, broken ones included.
        by: "cfs" (see `forgetting_scores`) or "random" (scores are random numbers).
        keep: Largest share of all images to keep, in (0, 1].
        generic: Features of the model before, for "cfs".
        adapted: Features of the model after; also what near-duplicates are told by.
        near_duplicate: As `near_duplicates` takes it; None to leave them in.
        seed: Of the random numbers.

    Raises:
        ValueError: Features are missing, of other data or of different widths, or a number is out of range.
    """
    check_rules(by, keep, generic, adapted, near_duplicate)
    for folder in (generic, adapted):
        if folder is not None and folder.settings["num_images"] != num_images:
            raise ValueError(
                f"{folder.path}: features of {folder.settings['num_images']} images, the data have {num_images}. "
                "Embed these data."
            )
    scores = np.random.default_rng(seed).random(num_images, dtype=np.float32)
    names: list[str | None] = [None] * num_images
    repeated = np.full(num_images, -1, np.int64)
    if adapted is not None:
        usable, places = adapted.rows, slice(None)
        if by == "cfs":  # both leave the same broken images out, unless a file was changed between
            usable, places, others = np.intersect1d(adapted.rows, generic.rows, return_indices=True)
            cfs = forgetting_scores(generic.embeddings[others], adapted.embeddings[places])
            scores = np.full(num_images, np.nan, np.float32)
            scores[usable] = cfs
        broken = np.ones(num_images, bool)
        broken[usable] = False
        scores[broken] = np.nan
        for row, name in zip(adapted.rows, adapted.names, strict=True):
            names[row] = name
        if near_duplicate is not None:
            order = np.argsort(scores[usable], kind="stable")
            found = near_duplicates(adapted.embeddings[places], near_duplicate, order)
            repeated[usable] = np.where(found < 0, -1, usable[found])
    candidates = np.flatnonzero(~np.isnan(scores) & (repeated < 0))
    kept = np.zeros(num_images, bool)
    kept[candidates[np.argsort(scores[candidates], kind="stable")[: max(1, round(keep * num_images))]]] = True
    return Selection(scores, repeated, kept, names)


def check_index(out: str | os.PathLike) -> None:
    """Stops before a selection is made that `write_selection` could not write.

    Raises:
        ValueError: `out` doesn't end in .parquet.
        FileExistsError: There is such a file.
        OSError: It can't be written.
    """
    if Path(out).suffix != ".parquet":
        raise ValueError(f"{out}: the index is a parquet file; give it a name that ends in .parquet.")
    if Path(out).exists():
        raise FileExistsError(f"{out} exists already: choose another name.")
    require_writable(Path(out))


def write_selection(selection: Selection, out: str | os.PathLike, data: str, settings: dict[str, Any]) -> None:
    """Writes the index: a parquet file with the columns row, name, score, duplicate_of and kept, of all images.

    Args:
        selection: What to write.
        out: The file, `*.parquet`.
        data: What the rows are rows of: anything that `load_person_images` takes, by a path from the root.
        settings: How it was made.

    Raises:
        ValueError: `out` doesn't end in .parquet, or `data` are an index themselves.
        FileExistsError, OSError: As in `check_index`.
    """
    check_index(out)
    require_no_index(data)
    table = pa.Table.from_pydict(
        {
            "row": np.arange(len(selection.kept)),
            "name": pa.array(selection.names, pa.string()),
            "score": selection.scores,
            "duplicate_of": selection.duplicate_of,
            "kept": selection.kept,
        }
    )
    told = {"data": data, "num_images": len(selection.kept), **settings}
    table = table.replace_schema_metadata({SELECTION_METADATA: json.dumps(told).encode()})
    with written_aside(Path(out)) as part:
        pq.write_table(table, part)
