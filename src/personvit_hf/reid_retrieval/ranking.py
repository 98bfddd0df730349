"""Re-identification scored as retrieval: CMC, mAP and mINP under the Market-1501 protocol, with numpy alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

logger = logging.getLogger(__name__)

JUNK_ID = -1
DISTRACTOR_ID = 0
# Distances held at once, so that memory follows this number and not queries x gallery.
CHUNK_ELEMENTS = 2**22


def evaluate_reid(
    query_embeddings: Any = None,
    gallery_embeddings: Any = None,
    *,
    query_person_ids: Any,
    gallery_person_ids: Any,
    query_camera_ids: Any,
    gallery_camera_ids: Any,
    distances: Any = None,
    metric: Literal["cosine", "euclidean"] = "cosine",
    max_rank: int = 50,
    ties: Literal["index", "pessimistic"] = "index",
) -> dict[str, Any]:
    """Scores person retrieval under the Market-1501 protocol; numpy arrays, torch tensors or lists come in.

    Gallery entries with person_id -1 (junk) are ignored, and so are those of the query's own person seen by the
    query's own camera. Gallery entries with person_id 0 (distractors) stay and can only be wrong. A query is valid if
    at least one true match is left for it; the others are left out of every mean and counted. A query whose person_id
    is -1 or 0 is nobody's identity, so it is never valid.

    The rank of a true match is the number of kept gallery entries before it, counted without sorting the gallery.
    Equal distances are ranked by gallery index (`ties="index"`, what a stable argsort gives) or with the true matches
    last among equals (`ties="pessimistic"`: a model that maps everyone to one point gains nothing from gallery order).

    Args:
        query_embeddings: (queries, dim), floating point, with `gallery_embeddings`; or None with `distances`.
        gallery_embeddings: (gallery, dim), floating point.
        query_person_ids: (queries,) integers; 1 and above are identities.
        gallery_person_ids: (gallery,) integers; -1 junk, 0 distractor, 1 and above identities.
        query_camera_ids: (queries,) integers.
        gallery_camera_ids: (gallery,) integers.
        distances: (queries, gallery) real numbers in place of the embeddings, small = similar, any unit.
        metric: distance between embeddings, see `pairwise_distances`; not used with `distances`.
        max_rank: length of the CMC curve; a smaller gallery gives as many values, constant after its end.
        ties: order of equal distances, see above.

    Returns:
        A dict; all scores are float64 fractions in [0, 1]. mAP and mINP (means over valid queries); cmc (max_rank,),
        where cmc[k - 1] is the share of valid queries with a true match among the first k; rank1, rank5, rank10;
        average_precision (valid queries,), in query order; valid_queries, their indices; num_valid_queries and
        num_queries.

    Raises:
        ValueError: An argument has the wrong shape or type, holds NaN, or no query has a true match.

    Source: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015 (protocol); average precision is
        the mean of precision at each true match, as in eval_func of hustvl/PersonViT, without trapezoids. mINP: Ye et
        al., "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI 2022, section 4.1.

    Example:
        >>> figures = evaluate_reid(
        ...     distances=[[0.1, 0.2, 0.3]], query_person_ids=[7], query_camera_ids=[0],
        ...     gallery_person_ids=[7, 0, 7], gallery_camera_ids=[0, 1, 2])
        >>> figures["mAP"], figures["rank1"], figures["rank5"]  # the nearest is the query's own camera: ignored
        (0.5, 0.0, 1.0)
    """
    query_ids = _id_array(query_person_ids, "query_person_ids", minimum=JUNK_ID)
    gallery_ids = _id_array(gallery_person_ids, "gallery_person_ids", minimum=JUNK_ID)
    query_cameras = _id_array(query_camera_ids, "query_camera_ids", length=query_ids.size)
    gallery_cameras = _id_array(gallery_camera_ids, "gallery_camera_ids", length=gallery_ids.size)
    if ties not in ("index", "pessimistic"):
        raise ValueError(f'`ties` must be "index" or "pessimistic", got {ties!r}.')
    if isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1:
        raise ValueError(f"`max_rank` must be an integer of at least 1, got {max_rank!r}.")
    nobodies = int((query_ids <= DISTRACTOR_ID).sum())
    if nobodies:
        logger.warning("%d queries have person_id -1 or 0, which are no identities: they are left out.", nobodies)

    shape = (query_ids.size, gallery_ids.size)
    rows = _distance_rows(query_embeddings, gallery_embeddings, distances, metric, shape)
    kept = gallery_ids != JUNK_ID
    kept_ids, kept_cameras = gallery_ids[kept], gallery_cameras[kept]
    ranks_by_query = {}
    for query, row in enumerate(rows):
        same_person = kept_ids == query_ids[query]
        matches = same_person & (kept_cameras != query_cameras[query])
        if query_ids[query] > DISTRACTOR_ID and matches.any():
            ranks_by_query[query] = _match_ranks(row[kept], matches, ~same_person, ties)
    if not ranks_by_query:
        raise ValueError(
            f"None of the {query_ids.size} queries has a true match: a gallery entry with the query's person_id (1 or "
            "above) and another camera_id. Check that person ids agree between query and gallery and that camera ids "
            "differ."
        )
    return _figures(ranks_by_query, query_ids.size, max_rank)


def pairwise_distances(
    query_embeddings: np.ndarray,
    gallery_embeddings: np.ndarray,
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> np.ndarray:
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
    query, gallery = _embedding_pair(query_embeddings, gallery_embeddings)
    _check_metric(metric)
    return _distance_block(_prepared(query, metric), _prepared(gallery, metric), metric)


def _distance_rows(
    query_embeddings: Any, gallery_embeddings: Any, distances: Any, metric: str, shape: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Checks what was given and returns an iterator over the (gallery,) distance row of each query."""
    if distances is not None:
        if query_embeddings is not None or gallery_embeddings is not None:
            raise ValueError("Give either `distances` or `query_embeddings` and `gallery_embeddings`, not both.")
        matrix = _array(distances, "distances", kinds="fiu", ndim=2)
        if matrix.shape != shape:
            raise ValueError(
                f"`distances` must have a row per query and a column per gallery entry, {shape}; got {matrix.shape}."
            )
        return _given_rows(matrix)
    if query_embeddings is None or gallery_embeddings is None:
        raise ValueError("Give `query_embeddings` and `gallery_embeddings`, or `distances`.")
    _check_metric(metric)
    query, gallery = _embedding_pair(query_embeddings, gallery_embeddings)
    for name, embeddings, length in (("query", query, shape[0]), ("gallery", gallery, shape[1])):
        if len(embeddings) != length:
            raise ValueError(
                f"`{name}_embeddings` has {len(embeddings)} rows, `{name}_person_ids` has {length}: they must agree."
            )
    return _computed_rows(_prepared(query, metric), _prepared(gallery, metric), metric)


def _given_rows(matrix: np.ndarray) -> Iterator[np.ndarray]:
    for index, row in enumerate(matrix):
        if np.isnan(row).any():
            raise ValueError(f"`distances` holds NaN, first in row {index}.")
        yield row


def _computed_rows(query: np.ndarray, gallery: np.ndarray, metric: str) -> Iterator[np.ndarray]:
    step = max(1, CHUNK_ELEMENTS // len(gallery))
    for start in range(0, len(query), step):
        yield from _distance_block(query[start : start + step], gallery, metric)


def _prepared(embeddings: np.ndarray, metric: str) -> np.ndarray:
    """Float64 copy, of unit length for "cosine"."""
    embeddings = embeddings.astype(np.float64)
    if metric == "cosine":
        embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    return embeddings


def _distance_block(query: np.ndarray, gallery: np.ndarray, metric: str) -> np.ndarray:
    products = query @ gallery.T
    if metric == "cosine":
        # Rounded before the subtraction: a duplicate of the query is at exactly 0, not at float64's noise.
        return np.float32(1) - np.clip(products, -1, 1).astype(np.float32)
    products *= -2
    products += np.square(query).sum(axis=1)[:, None]
    products += np.square(gallery).sum(axis=1)
    return np.maximum(products, 0).astype(np.float32)


def _match_ranks(row: np.ndarray, matches: np.ndarray, others: np.ndarray, ties: str) -> np.ndarray:
    """Zero-based ranks of one query's true matches, ascending, among `matches` and `others` of its distance row."""
    match_indices, other_indices = np.flatnonzero(matches), np.flatnonzero(others)
    match_indices = match_indices[np.argsort(row[match_indices], kind="stable")]
    other_distances = row[other_indices]
    # Of two equals the one with the smaller index comes first: up to `split`, an equal distance counts as nearer.
    if ties == "index":
        splits = np.searchsorted(other_indices, match_indices)
    else:
        splits = np.full(match_indices.size, other_indices.size)
    wrong_before = [
        np.count_nonzero(other_distances[:split] <= distance) + np.count_nonzero(other_distances[split:] < distance)
        for distance, split in zip(row[match_indices], splits, strict=True)
    ]
    return np.arange(match_indices.size) + np.array(wrong_before)


def _figures(ranks_by_query: dict[int, np.ndarray], num_queries: int, max_rank: int) -> dict[str, Any]:
    all_ranks = list(ranks_by_query.values())
    average_precision = np.array([np.mean(np.arange(1, ranks.size + 1) / (ranks + 1)) for ranks in all_ranks])
    inverse_negative_penalty = np.array([ranks.size / (ranks[-1] + 1) for ranks in all_ranks])
    first_ranks = np.array([ranks[0] for ranks in all_ranks])
    cmc = np.array([(first_ranks < k).mean() for k in range(1, max(max_rank, 10) + 1)])
    return {
        "mAP": float(average_precision.mean()),
        "mINP": float(inverse_negative_penalty.mean()),
        "rank1": float(cmc[0]),
        "rank5": float(cmc[4]),
        "rank10": float(cmc[9]),
        "cmc": cmc[:max_rank],
        "average_precision": average_precision,
        "valid_queries": np.array(list(ranks_by_query), dtype=np.int64),
        "num_valid_queries": len(ranks_by_query),
        "num_queries": num_queries,
    }


def _check_metric(metric: str) -> None:
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f'`metric` must be "cosine" or "euclidean", got {metric!r}.')


def _embedding_pair(query_embeddings: Any, gallery_embeddings: Any) -> tuple[np.ndarray, np.ndarray]:
    query = _array(query_embeddings, "query_embeddings", kinds="f", ndim=2)
    gallery = _array(gallery_embeddings, "gallery_embeddings", kinds="f", ndim=2)
    for name, embeddings in (("query_embeddings", query), ("gallery_embeddings", gallery)):
        broken = ~np.isfinite(embeddings).all(axis=1)
        if broken.any():
            raise ValueError(f"`{name}` holds NaN or infinity, first in row {int(broken.argmax())}.")
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"`query_embeddings` and `gallery_embeddings` must have equal width, got {query.shape[1]} and "
            f"{gallery.shape[1]}."
        )
    return query, gallery


def _id_array(values: Any, name: str, *, length: int | None = None, minimum: int | None = None) -> np.ndarray:
    array = _array(values, name, kinds="iu", ndim=1).astype(np.int64)
    if length is not None and array.size != length:
        raise ValueError(f"`{name}` must have {length} entries, as many as there are person ids; got {array.size}.")
    if minimum is not None and array.min() < minimum:
        raise ValueError(f"`{name}` must be at least {minimum} (junk), got {array.min()}.")
    return array


def _array(values: Any, name: str, *, kinds: str, ndim: int) -> np.ndarray:
    """`values` as a non-empty array of the wanted kinds (numpy's letters) and number of axes."""
    if hasattr(values, "detach"):  # a torch tensor, known by its method: this module does without torch
        values = values.detach().cpu()
        if values.is_floating_point() and values.element_size() < 4:  # numpy has no bfloat16
            values = values.float()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"`{name}` is not a regular array: {error}") from error
    if array.ndim != ndim or not array.size:
        raise ValueError(f"`{name}` must be a non-empty array with {ndim} axes, got shape {array.shape}.")
    if array.dtype.kind not in kinds:
        wanted = {"iu": "integers", "f": "floating point", "fiu": "real numbers"}[kinds]
        raise ValueError(f"`{name}` must hold {wanted}, got {array.dtype}.")
    return array
