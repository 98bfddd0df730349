"""Distances between embeddings in blocks of bounded size, and checks of the arrays that come in; numpy alone.

Torch tensors are known by their methods, so that this folder works without torch: those on a CPU are read in place,
distances between those on a GPU are computed there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Metric = Literal["cosine", "euclidean"]

# Elements of the arrays that are copied for a check or a conversion.
_COPY_ELEMENTS = 2**21
# Below this share of the two squared lengths a squared distance is float64's rounding and counts as 0.
_CANCELLATION = 2.0**-40
_MIN_NORM = 1e-12


def pairwise_distances(query_embeddings: Any, gallery_embeddings: Any, metric: Metric = "cosine") -> np.ndarray:
    """Distances between every query and every gallery embedding.

    Products are summed in float64 and rounded to float32 once, so the order of summation (which changes with the size
    of a matrix product) does not show, and equal embeddings get equal distances.

    Args:
        query_embeddings: (queries, dim), floating point.
        gallery_embeddings: (gallery, dim), floating point.
        metric: "cosine": 1 - cosine similarity, in [0, 2], half the squared Euclidean distance of L2-normalised
            embeddings; a zero vector is at 1 from everything. "euclidean": squared Euclidean distance of the
            embeddings as they are, in [0, inf).

    Returns:
        (queries, gallery) float32.

    Raises:
        ValueError: An argument has the wrong shape or type or holds NaN or infinity.
    """
    pair = EmbeddingDistances.of(query_embeddings, gallery_embeddings, metric)
    return pair.exact_block(np.arange(len(pair.query)), np.arange(len(pair.gallery)))


@dataclass(frozen=True)
class EmbeddingDistances:
    """Distances computed when they are asked for: whole blocks fast, with a bounded error, single ones exactly.

    Attributes:
        query: (queries, dim) floating point, an array or memory map.
        gallery: (gallery, dim), the same.
        on_gpu: The two as CUDA tensors, if they came as such, for whole blocks. What is picked out of them one by one
            comes from main memory: a GPU would take longer to be asked than to answer.
        metric: As in `pairwise_distances`, whose values `exact` gives.
        query_norms: (queries,) float64 lengths.
        gallery_norms: (gallery,) float64 lengths.
        unit: Distances of blocks are in this unit.
    """

    query: Any
    gallery: Any
    on_gpu: tuple[Any, Any] | None
    metric: Metric
    query_norms: np.ndarray
    gallery_norms: np.ndarray
    unit: float

    @classmethod
    def of(cls, query_embeddings: Any, gallery_embeddings: Any, metric: Metric) -> EmbeddingDistances:
        """Checks two sets of embeddings and measures their lengths.

        Raises:
            ValueError: An argument has the wrong shape or type or holds NaN or infinity.
        """
        check_metric(metric)
        query = embedding_array(query_embeddings, "query_embeddings")
        gallery = embedding_array(gallery_embeddings, "gallery_embeddings")
        if query.shape[1] != gallery.shape[1]:
            raise ValueError(
                f"`query_embeddings` and `gallery_embeddings` must have equal width, got {query.shape[1]} and "
                f"{gallery.shape[1]}."
            )
        # a GPU multiplies with what it holds alone
        together = hasattr(query, "detach") and query.device == getattr(gallery, "device", None)
        on_gpu = (query, gallery) if together else None
        query, gallery = host_array(query), host_array(gallery)
        query_norms = row_norms(query, "query_embeddings")
        gallery_norms = row_norms(gallery, "gallery_embeddings")
        longest = max(query_norms.max(), gallery_norms.max(), _MIN_NORM)
        unit = 1.0 if metric == "cosine" else float(longest) ** 2
        return cls(query, gallery, on_gpu, metric, query_norms, gallery_norms, unit)

    @property
    def width(self) -> int:
        """Numbers that a gallery entry takes in a block's gallery side."""
        return self.query.shape[1]

    @property
    def tolerance(self) -> float:
        """Largest difference between a block's element plus its offset and the exact distance, in `unit`s.

        A float32 scalar product of unit vectors is off by at most dim x 2^-24, in whatever order it is summed; the
        rest is for rounding what goes into it and comes out.
        """
        terms = 1 if self.metric == "cosine" else 3  # |g|^2 - 2 q g, with lengths up to 1
        return terms * (self.width + 16) * 2.0**-24

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest distance possible, in `unit`s."""
        return 0.0, 2.0 if self.metric == "cosine" else 4.0

    def offsets(self, queries: np.ndarray) -> np.ndarray:
        """What a query's row of a block lacks to be distances, in `unit`s; (queries,) float64."""
        if self.metric == "cosine":
            return np.ones(queries.size)
        return np.square(self.query_norms[queries]) / self.unit

    def query_block(self, queries: np.ndarray) -> np.ndarray:
        """The queries' side of the matrix product that `block` is."""
        if self.metric == "cosine":
            return _scaled(self.query[queries], -1 / np.maximum(self.query_norms[queries], _MIN_NORM))
        return _scaled(self.query[queries], np.full(queries.size, -2 / np.sqrt(self.unit)))

    def gallery_block(self, columns: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """The gallery's side: unit vectors, or vectors and their squared lengths for "euclidean"."""
        norms = self.gallery_norms[columns]
        if self.metric == "cosine":
            return _scaled(self.gallery[columns], 1 / np.maximum(norms, _MIN_NORM)), None
        scaled = _scaled(self.gallery[columns], np.full(norms.size, 1 / np.sqrt(self.unit)))
        return scaled, (np.square(norms) / self.unit).astype(np.float32)

    def block(self, query_block: np.ndarray, gallery_block: tuple[np.ndarray, np.ndarray | None]) -> np.ndarray:
        """(queries, columns) float32: distances in `unit`s, less the row's offset, within `tolerance`."""
        vectors, squares = gallery_block
        products = query_block @ vectors.T
        if squares is not None:
            products += squares
        return products

    def subset(self, queries: np.ndarray, columns: np.ndarray) -> EmbeddingDistances:
        """Distances between some queries and some gallery entries."""
        parts = self.query[queries], self.gallery[columns]
        on_gpu = None if self.on_gpu is None else (self.on_gpu[0][queries], self.on_gpu[1][columns])
        norms = self.query_norms[queries], self.gallery_norms[columns]
        return EmbeddingDistances(*parts, on_gpu, self.metric, *norms, self.unit)

    def exact(self, query: int, columns: np.ndarray) -> np.ndarray:
        """(columns,) float32 distances of one query, summed row by row in float64: alike in every call."""
        rows = self.gallery[columns].astype(np.float64)
        products = np.einsum("nd,d->n", rows, self.query[query].astype(np.float64))
        return _finished(products, self.query_norms[query], self.gallery_norms[columns], self.metric)

    def exact_block(self, queries: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """(queries, columns) float32, as `exact` but for the order of the float64 sums; quicker for many."""
        vectors = self.query[queries].astype(np.float64)
        norms = self.query_norms[queries, None]
        distances = np.empty((queries.size, columns.size), np.float32)
        step = max(1, _COPY_ELEMENTS // max(self.width, queries.size))
        for start in range(0, columns.size, step):
            part = columns[start : start + step]
            products = vectors @ self.gallery[part].astype(np.float64).T
            distances[:, start : start + step] = _finished(products, norms, self.gallery_norms[part], self.metric)
        return distances

    def exact_block_on_gpu(self, queries: np.ndarray, columns: Any) -> Any:
        """As `exact_block`, a CUDA tensor; in float64 as well, for "float32" products may be rounded to TF32 there."""
        query, gallery = self.on_gpu[0][queries].double(), self.on_gpu[1][columns].double()
        products = query @ gallery.T
        query_norms = query.new_tensor(self.query_norms[queries])[:, None]
        gallery_norms = query.new_tensor(self.gallery_norms[columns])
        if self.metric == "cosine":
            products /= query_norms.clamp_(min=_MIN_NORM) * gallery_norms.clamp_(min=_MIN_NORM)
            return 1 - products.clamp_(-1, 1).float()
        squares = query_norms.square() + gallery_norms.square()
        products = squares - 2 * products
        return products.masked_fill_(products < _CANCELLATION * squares, 0).float()


@dataclass(frozen=True)
class GivenDistances:
    """A matrix of distances with the methods of `EmbeddingDistances`; (queries, gallery), any real numbers."""

    matrix: Any
    on_gpu = None
    unit = 1.0
    tolerance = 0.0
    width = 1

    @classmethod
    def of(cls, distances: Any, shape: tuple[int, int]) -> GivenDistances:
        """Checks a matrix against the number of person ids.

        Raises:
            ValueError: It has another shape, holds no real numbers, or NaN.
        """
        matrix = as_array(distances, "distances", kinds="fiu", ndim=2)
        if matrix.shape != shape:
            raise ValueError(
                f"`distances` must have a row per query and a column per gallery entry, {shape}; got {matrix.shape}."
            )
        for start, rows in _in_steps(matrix):
            broken = np.isnan(host_array(rows).min(axis=1))
            if broken.any():
                raise ValueError(f"`distances` holds NaN, first in row {start + int(broken.argmax())}.")
        return cls(matrix)

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest finite distance."""
        extremes = []
        for _, rows in _in_steps(self.matrix):
            finite = host_array(rows)[np.isfinite(host_array(rows))]
            if finite.size:
                extremes += [finite.min(), finite.max()]
        return (float(min(extremes)), float(max(extremes))) if extremes else (0.0, 0.0)

    def offsets(self, queries: np.ndarray) -> np.ndarray:
        """Nothing is lacking."""
        return np.zeros(queries.size)

    def query_block(self, queries: np.ndarray) -> Any:
        """Rows of the matrix."""
        return self.matrix[queries]

    def gallery_block(self, columns: Any) -> Any:
        """Which columns."""
        return columns

    def block(self, query_block: Any, gallery_block: Any) -> np.ndarray:
        """(queries, columns), a copy, float32 or float64."""
        block = host_array(query_block[:, gallery_block])
        return np.array(block, dtype=block.dtype if block.dtype in (np.float32, np.float64) else np.float64)

    def subset(self, queries: np.ndarray, columns: np.ndarray) -> GivenDistances:
        """Distances between some queries and some gallery entries."""
        return GivenDistances(self.matrix[queries][:, columns])

    def exact(self, query: int, columns: np.ndarray) -> np.ndarray:
        """(columns,) distances of one query."""
        row = host_array(self.matrix[query][columns])
        return row if row.dtype in (np.float32, np.float64) else row.astype(np.float64)

    def exact_block(self, queries: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """(queries, columns) distances."""
        return self.block(self.query_block(queries), columns)


def check_metric(metric: str) -> None:
    """Raises ValueError for a metric that there is not."""
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f'`metric` must be "cosine" or "euclidean", got {metric!r}.')


def embedding_array(values: Any, name: str) -> Any:
    """`values` as a non-empty floating point (images, dim) array, or as the CUDA tensor that it is."""
    return as_array(values, name, kinds="f", ndim=2)


def row_norms(embeddings: Any, name: str) -> np.ndarray:
    """(rows,) float64 lengths.

    Raises:
        ValueError: A row holds NaN or infinity.
    """
    norms = np.empty(len(embeddings))
    for start, rows in _in_steps(embeddings):
        rows = host_array(rows).astype(np.float64)
        norms[start : start + len(rows)] = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    broken = ~np.isfinite(norms)
    if broken.any():
        raise ValueError(f"`{name}` holds NaN or infinity, first in row {int(broken.argmax())}.")
    return norms


def as_array(values: Any, name: str, *, kinds: str, ndim: int) -> Any:
    """`values` as a non-empty array of the wanted kinds (numpy's letters) and number of axes; CUDA tensors stay."""
    if hasattr(values, "detach"):
        values = values.detach()
        if values.is_floating_point() and values.element_size() < 4:  # numpy has no bfloat16
            values = values.float()
        if values.is_cuda and values.ndim == ndim == 2 and values.numel() and values.is_floating_point():
            return values
        values = values.cpu()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"`{name}` is not a regular array: {error}") from error
    if array.ndim != ndim or not array.size:
        raise ValueError(f"`{name}` must be a non-empty array with {ndim} axes, got shape {array.shape}.")
    if array.dtype.kind not in kinds:
        wanted = {"iu": "integers", "f": "floating point", "fiu": "real numbers", "iuUO": "integers or strings"}[kinds]
        raise ValueError(f"`{name}` must hold {wanted}, got {array.dtype}.")
    return array


def _in_steps(matrix: Any) -> Iterator[tuple[int, Any]]:
    """(first row, rows) of a matrix or memory map, in pieces that may be copied."""
    step = max(1, _COPY_ELEMENTS // matrix.shape[1])
    for start in range(0, len(matrix), step):
        yield start, matrix[start : start + step]


def host_array(values: Any) -> np.ndarray:
    """An array as it is, a tensor as an array in main memory."""
    return values.cpu().numpy() if hasattr(values, "detach") else values


def _scaled(rows: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Each row times its factor, in float32."""
    if rows.dtype == np.float64 or np.abs(factors).min() < 1e-30:  # float32 would round such factors to nothing
        return (rows * factors[:, None]).astype(np.float32)
    return rows.astype(np.float32, copy=False) * factors[:, None].astype(np.float32)


def _finished(products: np.ndarray, query_norms: Any, gallery_norms: np.ndarray, metric: str) -> np.ndarray:
    """Distances from float64 scalar products of embeddings as they are; changes `products`."""
    if metric == "cosine":
        products /= np.maximum(query_norms, _MIN_NORM) * np.maximum(gallery_norms, _MIN_NORM)
        # Rounded before the subtraction: a duplicate of the query is at exactly 0, not at float64's noise.
        return np.float32(1) - np.clip(products, -1, 1).astype(np.float32)
    squares = np.square(query_norms) + np.square(gallery_norms)
    products *= -2
    products += squares
    products[products < _CANCELLATION * squares] = 0
    return products.astype(np.float32)
