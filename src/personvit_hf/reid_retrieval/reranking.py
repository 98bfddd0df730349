"""k-reciprocal re-ranking whose memory follows the neighbours, not images x images; numpy alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .distances import embedding_array, row_norms

# Rows and columns of a block of distances (16 MiB in float32; larger ones are slower, being paged in anew each time).
BLOCK_ROWS = 2048
# Elements of the arrays that mark or add up whole rows.
_SCRATCH_ELEMENTS = 2**24
# Images whose distances give a first bound on how far the nearest neighbours are.
_SAMPLE = 1024
_NOTHING = np.uint64(2**64 - 1)


def rerank(
    query: Any,
    gallery: Any,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Distances that take the neighbours of both images into account: k-reciprocal encoding.

    The neighbours of all images come from blocks of distances, each computed once for both of its sides; everything
    after that is sparse. Besides the result (queries x gallery x 4 bytes) it takes one float32 copy of the embeddings
    and some hundred numbers an image.

    Args:
        query: (queries, dim) floating point: an array, memory map or torch tensor. Squared Euclidean distances of the
            embeddings as they are; L2-normalise them first for cosine (`embed_images` does).
        gallery: (gallery, dim), likewise.
        k1: Number of neighbours that must have each other in common.
        k2: Number of neighbours, with the image itself, over which its code is averaged; 1 for none.
        lambda_value: Share of the original distance, each query's divided by its largest; 0 is Jaccard's alone.
        out: float32 (queries, gallery) to write to, such as a `numpy.memmap` if it doesn't fit in memory.

    Returns:
        (queries, gallery) float32 in [0, 1], for `evaluate_reid(distances=...)`.

    Raises:
        ValueError: An argument has the wrong shape, type or range, or embeddings hold NaN or infinity.

    Source: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017. As the released
        code and fast-reid do: half of k1 is rounded to even, rows of distances (queries and gallery together) are
        divided by their maximum. In float32; the released code's float16 is off by up to 5e-3.

    Example:
        >>> rerank(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), k1=2, k2=1).argmin(axis=1).tolist()
        [0, 1, 2]
    """
    query, gallery = embedding_array(query, "query"), embedding_array(gallery, "gallery")
    for embeddings, name in ((query, "query"), (gallery, "gallery")):
        row_norms(embeddings, name)
    shape = (len(query), len(gallery))
    _check(query.shape[1], gallery.shape[1], sum(shape), k1, k2, lambda_value)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32:
        raise ValueError(f"`out` must be float32 with shape {shape}, got {out.dtype} with shape {out.shape}.")
    vectors = _augmented(query, gallery)
    neighbours, longest = _neighbours(vectors, k1 + 1, out, query if hasattr(query, "detach") else None)
    codes = _codes(vectors, neighbours, longest, half=int(np.around(k1 / 2)) + 1)
    del vectors
    if k2 > 1:
        codes = _averaged(codes, neighbours[:, :k2])
    _to_final(out, codes, longest, lambda_value)
    return out


def _check(query_width: int, gallery_width: int, num_images: int, k1: int, k2: int, lambda_value: float) -> None:
    if query_width != gallery_width:
        raise ValueError(f"`query` and `gallery` must have equal width, got {query_width} and {gallery_width}.")
    for name, value, highest in (("k1", k1, num_images - 1), ("k2", k2, k1 + 1)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= highest:
            limit = "one less than the images" if name == "k1" else "k1 + 1"
            raise ValueError(f"`{name}` must be an integer from 1 to {highest} ({limit}), got {value!r}.")
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"`lambda_value` must be in [0, 1], got {lambda_value}.")


def _augmented(query: Any, gallery: Any) -> np.ndarray:
    """(images, dim + 2) float32 rows [x, 1, |x|^2]: their product with [-2 x, |x|^2, 1] is a squared distance.

    x is less the mean of all, which changes no distance and keeps the products small, so that little cancels.
    """
    num_images, width = len(query) + len(gallery), query.shape[1]
    rows = np.ones((num_images, width + 2), np.float32)
    mean = np.zeros(width)
    for start, part in _parts(query, gallery):
        rows[start : start + len(part), :width] = part
        mean += part.sum(axis=0, dtype=np.float64) / num_images
    for start in range(0, num_images, BLOCK_ROWS):
        part = rows[start : start + BLOCK_ROWS]
        part[:, :width] -= mean.astype(np.float32)
        part[:, -1] = np.einsum("nd,nd->n", part[:, :width], part[:, :width])
    return rows


def _parts(query: Any, gallery: Any) -> Iterator[tuple[int, np.ndarray]]:
    for first, embeddings in ((0, query), (len(query), gallery)):
        for start in range(0, len(embeddings), BLOCK_ROWS):
            part = embeddings[start : start + BLOCK_ROWS]
            yield first + start, part.cpu().numpy() if hasattr(part, "detach") else part


def _other_side(rows: Any) -> Any:
    """[-2 x, |x|^2, 1] of rows [x, 1, |x|^2]."""
    turned = rows * -2
    turned[:, -2], turned[:, -1] = rows[:, -1], 1
    return turned


def _neighbours(vectors: np.ndarray, num: int, out: np.ndarray, device: Any) -> tuple[np.ndarray, np.ndarray]:
    """The `num` nearest images of each, itself included, and its largest squared distance.

    Writes the squared distances between queries and gallery to `out`. Equal distances are ordered by index.

    Returns:
        int32 (images, num), nearest first, and float32 (images,).
    """
    num_images, num_queries = len(vectors), len(out)
    # A CUDA tensor's distances are computed beside it, in float64 because float32 products may be rounded to TF32.
    on_device = vectors if device is None else device.double().new_tensor(vectors)
    nearest = _Nearest(vectors, num)
    longest = np.zeros(num_images, np.float32)
    starts = range(0, num_images, BLOCK_ROWS)
    for first in starts:
        rows = slice(first, min(first + BLOCK_ROWS, num_images))
        turned = _other_side(on_device[rows])
        for second in starts[first // BLOCK_ROWS :]:
            columns = slice(second, min(second + BLOCK_ROWS, num_images))
            block = turned @ on_device[columns].T
            if device is not None:
                block = block.float().cpu().numpy()
            if rows == columns:
                np.fill_diagonal(block, 0)
            longest[rows] = np.maximum(longest[rows], block.max(axis=1))
            longest[columns] = np.maximum(longest[columns], block.max(axis=0))
            if first < num_queries < columns.stop:
                left = max(second, num_queries)
                part = block[: num_queries - first, left - second :]
                np.maximum(
                    part, 0, out=out[first : first + len(part), left - num_queries : columns.stop - num_queries]
                )
            nearest.add(block, rows, columns)
            if rows != columns:
                nearest.add_transposed(block, rows, columns)
    return nearest.indices(), np.maximum(longest, np.finfo(np.float32).tiny)


class _Nearest:
    """The nearest images of each so far, as numbers that sort by distance and then by index.

    A number holds the bits of the (non-negative) float32 distance above the 32 bits of the index.
    """

    def __init__(self, vectors: np.ndarray, num: int):
        self.found = np.full((len(vectors), num), _NOTHING)
        self.bound = np.empty(len(vectors), np.float32)
        sample = vectors[:: max(1, len(vectors) // max(_SAMPLE, num))]
        for start in range(0, len(vectors), BLOCK_ROWS):
            block = _other_side(vectors[start : start + BLOCK_ROWS]) @ sample.T
            farthest = np.partition(block, num - 1, axis=1)[:, num - 1]
            # for rounding: this product need not give the very same numbers as that of whole blocks
            self.bound[start : start + BLOCK_ROWS] = farthest + 1e-5 * vectors[:, -1].max()

    def add(self, block: np.ndarray, rows: slice, columns: slice) -> None:
        """Columns as neighbours of rows."""
        row, column = np.divmod(np.flatnonzero(block <= self.bound[rows, None]), block.shape[1])
        self._merge(rows, row, columns.start + column, block[row, column])

    def add_transposed(self, block: np.ndarray, rows: slice, columns: slice) -> None:
        """Rows as neighbours of columns."""
        row, column = np.divmod(np.flatnonzero(block <= self.bound[columns]), block.shape[1])
        order = np.argsort(column, kind="stable")
        row, column = row[order], column[order]
        self._merge(columns, column, rows.start + row, block[row, column])

    def _merge(self, images: slice, image: np.ndarray, neighbour: np.ndarray, distances: np.ndarray) -> None:
        """Takes in candidates: for each, which of `images` (ascending), which neighbour, and how far."""
        counts = np.bincount(image, minlength=images.stop - images.start)
        touched = np.flatnonzero(counts)
        if not touched.size:
            return
        keys = np.maximum(distances, 0).view(np.uint32).astype(np.uint64) << np.uint64(32)
        keys |= neighbour.astype(np.uint64)
        found = self.found[images]
        num = found.shape[1]
        table = np.full((touched.size, num + counts.max()), _NOTHING)
        table[:, :num] = found[touched]
        place = np.arange(image.size) - np.repeat(np.cumsum(counts[touched]) - counts[touched], counts[touched])
        table[np.repeat(np.arange(touched.size), counts[touched]), num + place] = keys
        table.sort(axis=1)
        found[touched] = table[:, :num]
        # NaN where fewer than `num` are found
        farthest = (found[:, -1] >> np.uint64(32)).astype(np.uint32).view(np.float32)
        self.bound[images] = np.fmin(self.bound[images], farthest)

    def indices(self) -> np.ndarray:
        """int32 (images, num), nearest first."""
        return (self.found & np.uint64(2**32 - 1)).astype(np.int32)


@dataclass(frozen=True)
class _Sparse:
    """A (rows, images) matrix, row by row: row i has `values` at `columns` from starts[i] to starts[i + 1]."""

    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> _Sparse:
        """From (entries in each row, columns, values) of consecutive rows."""
        counts, columns, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return cls(np.concatenate([[0], np.cumsum(counts)]), columns, values)

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries of some rows: for each, the place of its row in `index`, its column and its value."""
        counts = self.starts[index + 1] - self.starts[index]
        picked = np.arange(counts.sum()) + np.repeat(self.starts[index] - (np.cumsum(counts) - counts), counts)
        return np.repeat(np.arange(index.size), counts), self.columns[picked], self.values[picked]

    def transposed(self, first_row: int) -> _Sparse:
        """The transpose of the rows from `first_row` on, which count from 0 again."""
        start = self.starts[first_row]
        order = np.argsort(self.columns[start:])
        counts = np.diff(self.starts[first_row:])
        row = np.repeat(np.arange(counts.size, dtype=np.int32), counts)[order]
        per_column = np.bincount(self.columns[start:], minlength=self.starts.size - 1)
        return _Sparse(np.concatenate([[0], np.cumsum(per_column)]), row, self.values[start:][order])


def _row_chunks(num_images: int) -> Iterator[np.ndarray]:
    step = max(1, _SCRATCH_ELEMENTS // num_images)
    for start in range(0, num_images, step):
        yield np.arange(start, min(start + step, num_images))


def _mutual(neighbours: np.ndarray, num: int) -> np.ndarray:
    """Whether an image is among the `num` nearest of each of its own `num` nearest; bool (images, num)."""
    mutual = np.empty((len(neighbours), num), bool)
    step = max(1, _SCRATCH_ELEMENTS // num**2)
    for start in range(0, len(neighbours), step):
        images = np.arange(start, min(start + step, len(neighbours)))
        theirs = neighbours[neighbours[images, :num], :num]
        mutual[images] = (theirs == images[:, None, None]).any(axis=2)
    return mutual


def _codes(vectors: np.ndarray, neighbours: np.ndarray, longest: np.ndarray, half: int) -> _Sparse:
    """Each image's weights of its k-reciprocal neighbours, expanded by those that share two thirds of theirs."""
    num_images = len(neighbours)
    mutual, mutual_half = _mutual(neighbours, neighbours.shape[1]), _mutual(neighbours, half)
    half_size = mutual_half.sum(axis=1)
    parts = []
    marked = np.zeros(0, bool)
    for images in _row_chunks(num_images):
        offset = np.arange(images.size)[:, None] * num_images
        marked = np.zeros(images.size * num_images, bool) if marked.size != images.size * num_images else marked
        own = (offset + neighbours[images])[mutual[images]]
        marked[own] = True
        # The candidates of each (image, neighbour): the neighbour's own mutual neighbours among half as many.
        place, rank = np.nonzero(mutual[images])
        candidate = neighbours[images[place], rank]
        theirs = offset[place] + neighbours[candidate, :half]
        shared = (marked[theirs] & mutual_half[candidate]).sum(axis=1)
        accepted = shared > 2 / 3 * half_size[candidate]
        more = theirs[accepted][mutual_half[candidate[accepted]]]
        marked[own] = False
        place, column = np.divmod(_unique(np.concatenate([own, more])), num_images)
        distances = np.einsum("nd,nd->n", _other_side(vectors[images])[place], vectors[column])
        weights = np.exp(-np.maximum(distances, 0) / longest[images[place]])
        weights /= np.bincount(place, weights=weights)[place].astype(np.float32)
        parts.append((np.bincount(place, minlength=images.size), column.astype(np.int32), weights))
    return _Sparse.of(parts)


def _unique(keys: np.ndarray) -> np.ndarray:
    """Ascending, each once; numpy's own `unique` hashes, which takes longer here."""
    keys.sort()
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])]


def _averaged(codes: _Sparse, neighbours: np.ndarray) -> _Sparse:
    """Each row the mean of the rows of an image's nearest, itself among them."""
    num_images, num = neighbours.shape
    parts = []
    total = np.zeros(0, np.float32)
    for images in _row_chunks(num_images):
        if total.size != images.size * num_images:
            total = np.zeros(images.size * num_images, np.float32)
        keys = []
        for rank in range(num):
            place, column, value = codes.rows(neighbours[images, rank])
            keys.append(place * num_images + column)
            total[keys[-1]] += value  # no key twice in one row
        found = _unique(np.concatenate(keys))
        place, column = np.divmod(found, num_images)
        counts = np.bincount(place, minlength=images.size)
        parts.append((counts, column.astype(np.int32), total[found] / np.float32(num)))
        total[found] = 0
    return _Sparse.of(parts)


def _to_final(out: np.ndarray, codes: _Sparse, longest: np.ndarray, lambda_value: float) -> None:
    """Turns squared distances in `out` into the weighted sum of them and the Jaccard distance of the codes."""
    num_queries, num_gallery = out.shape
    gallery = codes.transposed(num_queries)
    for query in range(num_queries):
        entries = slice(codes.starts[query], codes.starts[query + 1])
        place, image, value = gallery.rows(codes.columns[entries])
        smaller = np.minimum(codes.values[entries][place], value)
        # Codes sum to 1, so the sum of the larger weights is 2 less that of the smaller.
        shared = np.bincount(image, weights=smaller, minlength=num_gallery).astype(np.float32)
        shared /= 2 - shared
        row = out[query]
        row *= lambda_value / longest[query]
        row += 1 - lambda_value
        shared *= 1 - lambda_value
        row -= shared
