"""Ranks of true matches, by counting what is nearer than each; numpy, or torch for what is on a GPU.

A block of float32 distances decides almost all: entries farther from a match's distance than float32's error. The few
others are compared by distances in float64, so the ranks don't depend on how the work is cut. On a GPU all distances
are computed in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .distances import EmbeddingDistances, GivenDistances
from .ids import DISTRACTOR_ID, JUNK_ID, RetrievalIds
from .scores import RocCounts

logger = logging.getLogger(__name__)

# An exact distance out of a matrix product takes so much less time than a single one (at 384 numbers a vector).
_PRODUCT_GAIN = 24
_INDEX_BITS = np.uint64(2**29 - 1)


@dataclass(frozen=True)
class _Target:
    """What is looked for in one query's row: its true matches, nearest first.

    Attributes:
        query: Index of the query.
        own: Entries of the query's person, ignored ones too, as indices among the kept ones; ascending.
        matches: True matches, as indices of gallery entries.
        distances: Their exact distances, ascending.
        nearer: How many others come before each; counted block by block.
    """

    query: int
    own: np.ndarray
    matches: np.ndarray
    distances: np.ndarray
    nearer: np.ndarray


@dataclass(frozen=True)
class _Rough:
    """What float32 tells about a row.

    Attributes:
        surely: For each match, how many entries come before it for certain.
        entries: Entries too near to some match to tell, in the order of their distances.
        matches: The matches they are too near to.
        first, end: Which of `entries`, for each of `matches`.
    """

    surely: np.ndarray
    entries: np.ndarray
    matches: np.ndarray
    first: np.ndarray
    end: np.ndarray


def match_ranks(
    pairs: EmbeddingDistances | GivenDistances,
    ids: RetrievalIds,
    ties: str,
    chunk_elements: int,
    roc: RocCounts | None = None,
) -> dict[int, np.ndarray]:
    """Ranks every valid query's true matches among what the protocol keeps for it.

    Args:
        pairs: Distances between queries and gallery.
        ids: Who and where they are.
        ties: "index" or "pessimistic", as in `evaluate_reid`.
        chunk_elements: Distances held at once.
        roc: Where to count right and wrong pairs, or None.

    Returns:
        {query: int64 (true matches,) ranks from 0, ascending}, in query order.
    """
    kept = np.flatnonzero(ids.gallery_people != JUNK_ID)
    targets = list(_targets(pairs, ids, kept))
    gallery_step = max(1, min(kept.size, 2 * chunk_elements // pairs.width))
    query_step = max(1, chunk_elements // gallery_step)
    for start in range(0, kept.size if targets else 0, gallery_step):
        columns = kept[start : start + gallery_step]
        contiguous = columns[-1] - columns[0] == columns.size - 1
        # A slice copies nothing.
        part = slice(columns[0], columns[-1] + 1) if contiguous else columns
        gallery_block = None if pairs.on_gpu else pairs.gallery_block(part)
        for first in range(0, len(targets), query_step):
            chunk = targets[first : first + query_step]
            queries = np.array([target.query for target in chunk])
            if pairs.on_gpu:
                block = _without_own(pairs.exact_block_on_gpu(queries, part), chunk, start)
                if roc is not None:
                    roc.add(roc.others, block.cpu().numpy() / pairs.unit)
                _count_nearer_on_gpu(block, chunk, columns, ties)
                continue
            block = _without_own(pairs.block(pairs.query_block(queries), gallery_block), chunk, start)
            offsets = pairs.offsets(queries)
            if roc is not None:
                roc.add(roc.others, block + offsets.astype(block.dtype)[:, None])
            if pairs.tolerance:
                block = _decide_roughly(block, offsets, chunk, columns, pairs, ties)
                if block is None:
                    continue
                block = _without_own(block, chunk, start)
            for row, target in zip(block, chunk, strict=True):
                _count_nearer(row, target, columns, ties)
    if roc is not None:
        for target in targets:
            roc.add(roc.matches, target.distances / pairs.unit)
    return {target.query: np.arange(target.matches.size) + target.nearer for target in targets}


def _targets(pairs: EmbeddingDistances | GivenDistances, ids: RetrievalIds, kept: np.ndarray) -> Iterator[_Target]:
    """The target of every valid query, in query order."""
    people, cameras = ids.gallery_people[kept], ids.gallery_cameras[kept]
    order = np.argsort(people, kind="stable")
    ranges = [np.searchsorted(people[order], ids.query_people, side) for side in ("left", "right")]
    duplicates = 0
    for query, (low, high) in enumerate(zip(*ranges, strict=True)):
        own = order[low:high]
        matches = own[cameras[own] != ids.query_cameras[query]] if ids.across_cameras else own
        if ids.query_people[query] <= DISTRACTOR_ID or not matches.size:
            continue
        matches = kept[matches]
        distances = pairs.exact(query, matches)
        nearest_first = np.argsort(distances, kind="stable")
        distances = distances[nearest_first]
        duplicates += isinstance(pairs, EmbeddingDistances) and distances[0] == 0
        yield _Target(query, own, matches[nearest_first], distances, np.zeros(matches.size, np.int64))
    if duplicates:
        logger.warning(
            "%d queries have a true match with the very same embedding: the same picture in query and gallery, or a "
            "model that maps pictures to one point. It counts as a match.",
            duplicates,
        )


def _without_own(block: Any, targets: list[_Target], start: int) -> Any:
    """The block with NaN, which is never nearer, for entries of each query's own person."""
    end = start + block.shape[1]
    own = [target.own[slice(*np.searchsorted(target.own, [start, end]))] - start for target in targets]
    rows = np.repeat(np.arange(len(targets)), [entries.size for entries in own])
    block[rows, np.concatenate(own)] = np.nan
    return block


def _count_nearer_on_gpu(block: Any, targets: list[_Target], columns: np.ndarray, ties: str) -> None:
    """Adds to each `target.nearer` what comes before each match; a CUDA tensor of exact distances comes in.

    An int64 key of a (non-negative) float32 distance's bits above 32 bits of the index sorts by distance and then by
    index, NaN last.
    """
    import torch

    keys = (block.view(torch.int32).long() << 32) + block.new_tensor(columns, dtype=torch.int64)
    most = max(target.matches.size for target in targets)
    wanted = np.full((len(targets), most), np.iinfo(np.int64).max)
    for row, target in zip(wanted, targets, strict=True):
        last = target.matches if ties == "index" else 2**32 - 1
        row[: target.matches.size] = (target.distances.view(np.int32).astype(np.int64) << 32) + last
    # An entry comes before all matches from its place among them on.
    place = torch.searchsorted(keys.new_tensor(wanted), keys)
    place += place.new_tensor(np.arange(len(targets)))[:, None] * (most + 1)
    counts = place.ravel().bincount(minlength=len(targets) * (most + 1)).cpu().numpy()
    nearer = np.cumsum(counts.reshape(len(targets), most + 1), axis=1)
    for row, target in zip(nearer, targets, strict=True):
        target.nearer[:] += row[: target.matches.size]


def _count_nearer(row: np.ndarray, target: _Target, columns: np.ndarray, ties: str) -> None:
    """Adds to `target.nearer` what comes before each match in a row of exact distances."""
    found = np.flatnonzero(row <= target.distances[-1])
    values = row[found]
    ascending = np.sort(values)
    nearer, nearer_or_tied = (np.searchsorted(ascending, target.distances, side) for side in ("left", "right"))
    if ties == "pessimistic":
        target.nearer[:] += nearer_or_tied
        return
    target.nearer[:] += nearer
    for match in np.flatnonzero(nearer < nearer_or_tied):
        tied = columns[found[values == target.distances[match]]]
        target.nearer[match] += np.searchsorted(tied, target.matches[match])


def _decide_roughly(
    block: np.ndarray,
    offsets: np.ndarray,
    targets: list[_Target],
    columns: np.ndarray,
    pairs: EmbeddingDistances,
    ties: str,
) -> np.ndarray | None:
    """Adds to each `target.nearer` what comes before each match, or returns a block of exact distances to count in.

    The latter if so much lies within float32's error that computing single distances would take longer.
    """
    rough = [_rough_counts(*of_row, columns, pairs) for of_row in zip(block, offsets, targets, strict=True)]
    if sum(row.entries.size for row in rough) > block.size / _PRODUCT_GAIN:
        return pairs.exact_block(np.array([target.query for target in targets]), columns)
    for target, row in zip(targets, rough, strict=True):
        target.nearer[:] += row.surely
        if not row.entries.size:
            continue
        lengths = row.end - row.first
        matches = np.repeat(row.matches, lengths)
        # first, first + 1, ..., end - 1 of each match, one after the other
        picked = np.arange(matches.size) + np.repeat(row.first - (np.cumsum(lengths) - lengths), lengths)
        distances, wanted = pairs.exact(target.query, row.entries)[picked], target.distances[matches]
        tied = distances == wanted
        if ties == "index":
            tied &= row.entries[picked] < target.matches[matches]
        np.add.at(target.nearer, matches[(distances < wanted) | tied], 1)
    return None


def _rough_counts(
    row: np.ndarray, offset: float, target: _Target, columns: np.ndarray, pairs: EmbeddingDistances
) -> _Rough:
    wanted = target.distances / pairs.unit - offset
    found = np.flatnonzero(row <= np.float32(wanted[-1] + pairs.tolerance))
    values, order = _roughly_ascending(row[found])
    surely = np.searchsorted(values, wanted - pairs.tolerance, side="left")
    perhaps = np.searchsorted(values, wanted + pairs.tolerance, side="right")
    matches = np.flatnonzero(surely < perhaps)
    first, end = surely[matches], perhaps[matches]
    # Each entry once, though it may be near to several matches.
    changes = np.zeros(found.size + 1, np.int64)
    np.add.at(changes, first, 1)
    np.add.at(changes, end, -1)
    positions = np.flatnonzero(np.cumsum(changes[:-1]))
    entries = columns[found[order[positions]]]
    return _Rough(surely, entries, matches, *np.searchsorted(positions, [first, end]))


def _roughly_ascending(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted float32 values, as float64 and off by less than float32's rounding, and their order.

    A float32 leaves 29 bits of a float64 unused: there the index goes, so that sorting values sorts indices too,
    which takes numpy a fifth of the time of `argsort`.
    """
    values = values.astype(np.float64)
    bits = values.view(np.uint64)
    bits |= np.arange(values.size, dtype=np.uint64)
    values.sort()
    return values, (bits & _INDEX_BITS).astype(np.int64)
