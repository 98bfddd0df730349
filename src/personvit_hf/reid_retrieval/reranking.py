"""k-reciprocal re-ranking whose memory follows the neighbours, not images x images; numpy, or torch on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .distances import embedding_array, host_array, row_norms

# Rows and columns of a block of distances (16 MiB in float32; larger ones are slower, being paged in anew each time).
BLOCK_ROWS = 2048
# Elements of the array that marks neighbours in whole rows.
_SCRATCH_ELEMENTS = 2**21
# Elements of what is made and thrown away at each step: small enough for a core's own cache.
_CACHED_ELEMENTS = 2**17
# Images whose distances give a first bound on how far the nearest neighbours are.
_SAMPLE = 1024
# Elements of a block of distances on a GPU; it takes some 28 bytes for each.
_GPU_ELEMENTS = 2**26
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
            embeddings as they are; L2-normalise them first for cosine (`embed_images` does). If it is a CUDA tensor,
            distances and neighbours are found on its GPU.
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
    if hasattr(query, "detach"):
        neighbours, longest = _neighbours_on_gpu(query.new_tensor(vectors), k1 + 1, out)
    else:
        neighbours, longest = _neighbours(vectors, k1 + 1, out)
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
            yield first + start, host_array(part)


def _other_side(rows: Any) -> Any:
    """[-2 x, |x|^2, 1] of rows [x, 1, |x|^2]."""
    turned = rows * -2
    turned[:, -2], turned[:, -1] = rows[:, -1], 1
    return turned


def _neighbours(vectors: np.ndarray, num: int, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The `num` nearest images of each, itself included, and its largest squared distance.

    Writes the squared distances between queries and gallery to `out`. Equal distances are ordered by index.

    Returns:
        int32 (images, num), nearest first, and float32 (images,).
    """
    num_images, num_queries = len(vectors), len(out)
    nearest = _Nearest(vectors, num)
    place = np.empty(min(BLOCK_ROWS, num_images) ** 2, np.float32)  # of each block: fresh memory costs time
    longest = np.zeros(num_images, np.float32)
    starts = range(0, num_images, BLOCK_ROWS)
    for first in starts:
        rows = slice(first, min(first + BLOCK_ROWS, num_images))
        turned = _other_side(vectors[rows])
        for second in starts[first // BLOCK_ROWS :]:
            columns = slice(second, min(second + BLOCK_ROWS, num_images))
            shape = rows.stop - rows.start, columns.stop - columns.start
            block = place[: shape[0] * shape[1]].reshape(shape)
            np.matmul(turned, vectors[columns].T, out=block)
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


def _neighbours_on_gpu(vectors: Any, num: int, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `_neighbours`, of CUDA vectors: some whole rows at a time, in float64, for float32 may be rounded to TF32."""
    import torch

    vectors = vectors.double()
    num_images, num_queries = len(vectors), len(out)
    indices, longest = np.empty((num_images, num), np.int32), np.empty(num_images, np.float32)
    everyone = torch.arange(num_images).to(vectors.device)
    for images in _row_chunks(num_images, _GPU_ELEMENTS // num_images):
        rows = slice(images[0], images[-1] + 1)
        block = (_other_side(vectors[rows]) @ vectors.T).float().clamp_(min=0)
        block[everyone[: images.size], everyone[rows]] = 0
        longest[rows] = block.amax(dim=1).cpu()
        if images[0] < num_queries:
            part = torch.from_numpy(out[rows])
            part.copy_(block[: len(part), num_queries:])
        keys = (block.view(torch.int32).long() << 32) + everyone  # as in `_Nearest`
        nearest = keys.topk(num, dim=1, largest=False).values
        indices[rows] = (nearest & (2**32 - 1)).cpu()
    return indices, np.maximum(longest, np.finfo(np.float32).tiny)


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
        column, row = np.divmod(np.sort(column * len(block) + row), len(block))
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
    def of(cls, parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> _Sparse:
        """From (entries in each row, columns, values) of consecutive rows."""
        counts, columns, values = (list(arrays) for arrays in zip(*parts, strict=True))
        joined = []
        for arrays in (counts, columns, values):
            joined.append(np.concatenate(arrays))
            arrays.clear()  # never all of it twice
        return cls(_starts(joined[0]), *joined[1:])


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def _pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Two 32-bit numbers in one of 64 bits: sorting these is several times as fast as `argsort`."""
    return (high.astype(np.uint64) << np.uint64(32)) | low.view(np.uint32)


def _high(packed: np.ndarray) -> np.ndarray:
    return (packed >> np.uint64(32)).view(np.int64)


def _low(packed: np.ndarray) -> np.ndarray:
    return packed.astype(np.uint32)


def _row_chunks(num_images: int, step: int) -> Iterator[np.ndarray]:
    step = max(1, step)
    for start in range(0, num_images, step):
        yield np.arange(start, min(start + step, num_images))


def _mutual_ranks(neighbours: np.ndarray) -> np.ndarray:
    """How many nearest it takes for an image and each of its neighbours to be among each other's.

    int32 (images, num): the larger of the two ranks, counted from 0; `num` if it isn't among its neighbour's.
    """
    num_images, num = neighbours.shape
    image = np.arange(num_images)[:, None]
    pairs = (np.minimum(neighbours, image) * num_images + np.maximum(neighbours, image)).ravel()
    order = np.argsort(pairs)
    pairs = pairs[order]
    twice = np.flatnonzero(pairs[1:] == pairs[:-1])  # found from both sides
    one, other = order[twice], order[twice + 1]
    ranks = np.full(num_images * num, num, np.int32)
    ranks[one] = ranks[other] = np.maximum(one % num, other % num)
    ranks = ranks.reshape(num_images, num)
    # the image itself, found once; nearest in general, later among duplicates
    place, rank = np.nonzero(neighbours == image)
    ranks[place, rank] = rank
    return ranks


def _codes(vectors: np.ndarray, neighbours: np.ndarray, longest: np.ndarray, half: int) -> _Sparse:
    """Each image's weights of its k-reciprocal neighbours, expanded by those that share two thirds of theirs."""
    num_images, num = neighbours.shape
    ranks = _mutual_ranks(neighbours)
    mutual, mutual_half = ranks < num, ranks[:, :half] < half
    half_size = mutual_half.sum(axis=1)
    parts = []
    marked = np.zeros(0, bool)
    for images in _row_chunks(num_images, _SCRATCH_ELEMENTS // num_images):
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
        distances = _pair_distances(vectors, images[place], column)
        weights = np.exp(-np.maximum(distances, 0) / longest[images[place]])
        weights /= np.bincount(place, weights=weights)[place].astype(np.float32)
        parts.append((np.bincount(place, minlength=images.size), column.astype(np.int32), weights))
    return _Sparse.of(parts)


def _pair_distances(vectors: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Squared distances of pairs of images."""
    products = np.empty(one.size, np.float32)
    step = max(1, _CACHED_ELEMENTS // vectors.shape[1])
    for start in range(0, one.size, step):
        piece = slice(start, start + step)
        sides = (vectors[images[piece]][:, :-2] for images in (one, other))
        np.einsum("nd,nd->n", *sides, out=products[piece])
    return vectors[one, -1] + vectors[other, -1] - 2 * products


def _unique(keys: np.ndarray) -> np.ndarray:
    """Ascending, each once; numpy's own `unique` hashes, which takes longer here."""
    keys.sort()
    return keys[_is_first(keys)]


def _is_first(ascending: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones(min(1, ascending.size), bool), ascending[1:] != ascending[:-1]])


def _averaged(codes: _Sparse, neighbours: np.ndarray) -> _Sparse:
    """Each row the mean of the rows of an image's nearest, itself among them."""
    num_images, num = neighbours.shape
    parts = []
    per_image = max(1, num * codes.columns.size // num_images)
    # place x images has to fit in 32 bits, too
    for images in _row_chunks(num_images, min(_CACHED_ELEMENTS // per_image, 2**32 // num_images)):
        rows = neighbours[images].ravel()
        counts = codes.starts[rows + 1] - codes.starts[rows]
        entries = np.arange(counts.sum()) + np.repeat(codes.starts[rows] - (np.cumsum(counts) - counts), counts)
        keys = np.repeat(np.repeat(np.arange(images.size) * num_images, num), counts) + codes.columns[entries]
        packed = _pack(keys, codes.values[entries])
        packed.sort()
        keys = _high(packed)
        first = np.flatnonzero(_is_first(keys))
        totals = np.add.reduceat(_low(packed).view(np.float32), first)
        place, column = np.divmod(keys[first], num_images)
        parts.append((np.bincount(place, minlength=images.size), column.astype(np.int32), totals / np.float32(num)))
    return _Sparse.of(parts)


def _holders(codes: _Sparse, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """For each column the rows from `first_row` on that have it, counted from 0 again, packed with their values.

    Returns:
        (images + 1,) starts and the packed entries, column by column.
    """
    num_images = codes.starts.size - 1
    counts = np.zeros(num_images, np.int64)
    pieces = []
    # few enough pieces that going through all columns for each of them takes no time
    step = max(_CACHED_ELEMENTS, num_images) * num_images // max(1, codes.columns.size)
    for rows in _row_chunks(num_images - first_row, step):
        rows = rows + first_row
        piece = slice(codes.starts[rows[0]], codes.starts[rows[-1] + 1])
        pieces.append((rows, piece))
        counts += np.bincount(codes.columns[piece], minlength=num_images)
    starts = _starts(counts)
    free = starts[:-1].copy()
    packed = np.empty(starts[-1], np.uint64)
    for rows, piece in pieces:
        columns = codes.columns[piece]
        order = _pack(columns, np.arange(columns.size, dtype=np.uint32))
        order.sort()
        columns, order = _high(order), _low(order)
        counts = np.bincount(columns, minlength=num_images)
        row = np.repeat(rows - first_row, np.diff(codes.starts[rows[0] : rows[-1] + 2]))
        place = np.arange(columns.size) + (free - _starts(counts)[:-1])[columns]
        packed[place] = _pack(row[order], codes.values[piece][order])
        free += counts
    return starts, packed


def _to_final(out: np.ndarray, codes: _Sparse, longest: np.ndarray, lambda_value: float) -> None:
    """Turns squared distances in `out` into the weighted sum of them and the Jaccard distance of the codes."""
    num_queries, num_gallery = out.shape
    starts, holders = _holders(codes, num_queries)
    for query in range(num_queries):
        entries = slice(codes.starts[query], codes.starts[query + 1])
        columns = codes.columns[entries]
        first, end = starts[columns], starts[columns + 1]
        runs = (holders[i:j] for i, j in zip(first.tolist(), end.tolist(), strict=True))
        packed = np.concatenate([holders[:0], *runs])
        smaller = np.minimum(np.repeat(codes.values[entries], end - first), _low(packed).view(np.float32))
        # Codes sum to 1, so the sum of the larger weights is 2 less that of the smaller.
        shared = np.bincount(_high(packed), weights=smaller, minlength=num_gallery).astype(np.float32)
        shared /= 2 - shared
        row = out[query]
        row *= lambda_value / longest[query]
        row += 1 - lambda_value
        shared *= 1 - lambda_value
        row -= shared
