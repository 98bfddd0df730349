"""Re-identification scored as retrieval: CMC, mAP and mINP under the Market-1501 protocol; numpy, on a GPU torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from .counting import match_ranks
from .distances import EmbeddingDistances, GivenDistances, Metric, pairwise_distances
from .ids import RetrievalIds
from .scores import QueryScores, RocCounts, bootstrap_intervals, checked_groups, cmc_curve, group_figures, mean_figures

__all__ = ["evaluate_reid", "pairwise_distances"]

# Distances held at once (64 MiB in float32), so that memory follows this number and not queries x gallery.
CHUNK_ELEMENTS = 2**24


def evaluate_reid(
    query_embeddings: Any = None,
    gallery_embeddings: Any = None,
    *,
    query_person_ids: Any,
    gallery_person_ids: Any,
    query_camera_ids: Any = None,
    gallery_camera_ids: Any = None,
    distances: Any = None,
    metric: Metric = "cosine",
    protocol: Literal["cross_camera", "any_camera"] = "cross_camera",
    max_rank: int = 50,
    ties: Literal["index", "pessimistic"] = "index",
    false_positive_rates: Sequence[float] | None = None,
    bootstrap: int = 0,
    confidence: float = 0.95,
    seed: int = 0,
    query_groups: Mapping[str, Any] | None = None,
    camera_pairs: bool = False,
    chunk_elements: int | None = None,
) -> dict[str, Any]:
    """Scores person retrieval under the Market-1501 protocol; arrays, memory maps, torch tensors or lists come in.

    Gallery entries with person_id -1 (junk) are ignored, and so are those of the query's own person seen by the
    query's own camera. Gallery entries with person_id 0 (distractors) stay and can only be wrong. A query is valid if
    at least one true match is left for it; the others are left out of every mean and counted. A query whose person_id
    is -1 or 0 is nobody's identity, so it is never valid.

    The rank of a true match is the number of kept gallery entries before it: nothing but what is nearer than a
    query's last true match is looked at again. Products are taken in float32 (on a GPU in float64), and where that
    can't tell which of two entries is nearer, their distances are computed in float64 as `pairwise_distances` does, so
    the figures are exact and don't depend on `chunk_elements`. Equal distances are ranked by gallery index
    (`ties="index"`, what a stable argsort gives) or with the true matches last among equals (`ties="pessimistic"`: a
    model that maps everyone to one point gains nothing from gallery order).

    Args:
        query_embeddings: (queries, dim), floating point, with `gallery_embeddings`; or None with `distances`.
            CUDA tensors are multiplied on their GPU.
        gallery_embeddings: (gallery, dim), floating point; a `numpy.memmap` is read in pieces.
        query_person_ids: (queries,) integers; 1 and above are identities. Or strings: "-1" is junk, "0", "0000" and
            the like a distractor, every other string an identity, compared as it is written.
        gallery_person_ids: (gallery,) integers, -1 junk, 0 distractor, 1 and above identities; or strings likewise.
        query_camera_ids: (queries,) integers or strings.
        gallery_camera_ids: (gallery,) integers or strings.
        distances: (queries, gallery) real numbers in place of the embeddings, small = similar, any unit.
        metric: distance between embeddings, see `pairwise_distances`; not used with `distances`.
        protocol: "cross_camera", as above, or "any_camera": nothing is ignored but junk, and camera ids are not
            needed. A query that is in the gallery too then finds itself first; a warning counts such queries.
        max_rank: length of the CMC curve; a smaller gallery gives as many values, constant after its end.
        ties: order of equal distances, see above.
        false_positive_rates: shares of wrong pairs at which to give the share of right pairs accepted, by one
            threshold for all valid queries.
        bootstrap: number of resamples of the identities for confidence intervals; 0 for none.
        confidence: share of the resamples that an interval holds.
        seed: seed of the resamples.
        query_groups: labels of the queries by name, such as {"occlusion": (queries,) labels}; figures for each label.
            Strings or numbers, without None and NaN.
        camera_pairs: whether to score the queries of each camera against the gallery of each camera, too.
        chunk_elements: distances held at once; less memory, more passes. 2^24 by default (64 MiB).

    Returns:
        A dict; all scores are float64 fractions in [0, 1]. mAP and mINP (means over valid queries); cmc (max_rank,),
        where cmc[k - 1] is the share of valid queries with a true match among the first k; rank1, rank5, rank10;
        average_precision and first_match_rank (valid queries,), in query order; valid_queries, their indices;
        num_valid_queries and num_queries. If asked for: true_positive_rates, one for each of
        `false_positive_rates` (distances are told apart in 2^20 steps of the largest there can be, 2 for cosine, or of
        a given matrix's range); confidence_intervals, {figure: (low, high)}; by_group, {name: rows with the label and
        its figures}; by_camera_pair, rows with query_camera, gallery_camera and their figures, where the pair has a
        valid query.

    Raises:
        ValueError: An argument has the wrong shape or type, holds NaN, or no query has a true match.

    Source: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015 (protocol); average precision is
        the mean of precision at each true match, as in eval_func of hustvl/PersonViT, without trapezoids. mINP: Ye et
        al., "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI 2022, section 4.1. Error of
        float32 products: Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1.

    Example:
        >>> figures = evaluate_reid(
        ...     distances=[[0.1, 0.2, 0.3]], query_person_ids=[7], query_camera_ids=[0],
        ...     gallery_person_ids=[7, 0, 7], gallery_camera_ids=[0, 1, 2])
        >>> figures["mAP"], figures["rank1"], figures["rank5"]  # the nearest is the query's own camera: ignored
        (0.5, 0.0, 1.0)
    """
    chunk_elements = CHUNK_ELEMENTS if chunk_elements is None else chunk_elements
    _check_options(
        ties, {"max_rank": (max_rank, 1), "bootstrap": (bootstrap, 0), "chunk_elements": (chunk_elements, 1)}
    )
    ids = RetrievalIds.of(query_person_ids, gallery_person_ids, query_camera_ids, gallery_camera_ids, protocol)
    shape = (ids.query_people.size, ids.gallery_people.size)
    groups = None if query_groups is None else checked_groups(query_groups, shape[0])
    pairs = _distances(query_embeddings, gallery_embeddings, distances, metric, shape)
    roc = None if false_positive_rates is None else RocCounts(pairs.limits)
    ranks = match_ranks(pairs, ids, ties, chunk_elements, roc)
    if not ranks:
        raise ValueError(
            f"None of the {shape[0]} queries has a true match: a gallery entry with the query's person_id (1 or "
            "above) and another camera_id. Check that person ids agree between query and gallery and that camera ids "
            "differ."
        )
    scores = QueryScores.of(ranks)
    figures = {
        **mean_figures(scores),
        "cmc": cmc_curve(scores, max_rank),
        "average_precision": scores.average_precision,
        "first_match_rank": scores.first_match_rank,
        "valid_queries": scores.queries,
        "num_valid_queries": len(ranks),
        "num_queries": shape[0],
    }
    if roc is not None:
        figures["true_positive_rates"] = roc.true_positive_rates(false_positive_rates)
    if bootstrap:
        people = ids.query_people[scores.queries]
        figures["confidence_intervals"] = bootstrap_intervals(scores, people, bootstrap, confidence, seed)
    if groups is not None:
        figures["by_group"] = {name: group_figures(scores, labels, name) for name, labels in groups.items()}
    if camera_pairs:
        figures["by_camera_pair"] = list(_camera_pairs(pairs, ids, ties, chunk_elements))
    return figures


def _check_options(ties: str, counts: dict[str, tuple[Any, int]]) -> None:
    """Raises ValueError for a wrong order of ties, or a count (value, least value) that is none or too small."""
    if ties not in ("index", "pessimistic"):
        raise ValueError(f'`ties` must be "index" or "pessimistic", got {ties!r}.')
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")


def _distances(
    query_embeddings: Any, gallery_embeddings: Any, distances: Any, metric: Metric, shape: tuple[int, int]
) -> EmbeddingDistances | GivenDistances:
    """What was given, checked against the numbers of queries and gallery entries."""
    if distances is not None:
        if query_embeddings is not None or gallery_embeddings is not None:
            raise ValueError("Give either `distances` or `query_embeddings` and `gallery_embeddings`, not both.")
        return GivenDistances.of(distances, shape)
    if query_embeddings is None or gallery_embeddings is None:
        raise ValueError("Give `query_embeddings` and `gallery_embeddings`, or `distances`.")
    pairs = EmbeddingDistances.of(query_embeddings, gallery_embeddings, metric)
    for name, embeddings, length in (("query", pairs.query, shape[0]), ("gallery", pairs.gallery, shape[1])):
        if len(embeddings) != length:
            raise ValueError(
                f"`{name}_embeddings` has {len(embeddings)} rows, `{name}_person_ids` has {length}: they must agree."
            )
    return pairs


def _camera_pairs(pairs: Any, ids: RetrievalIds, ties: str, chunk_elements: int) -> Iterator[dict[str, Any]]:
    """Figures of the queries of one camera in the gallery of one camera, for each two cameras."""
    for query_camera in np.unique(ids.query_cameras):
        queries = np.flatnonzero(ids.query_cameras == query_camera)
        for gallery_camera in np.unique(ids.gallery_cameras):
            gallery = np.flatnonzero(ids.gallery_cameras == gallery_camera)
            if ids.across_cameras and query_camera == gallery_camera:
                continue
            ranks = match_ranks(pairs.subset(queries, gallery), ids.subset(queries, gallery), ties, chunk_elements)
            if ranks:
                scores = QueryScores.of(ranks)
                cameras = {"query_camera": query_camera, "gallery_camera": gallery_camera}
                cameras = {name: ids.cameras[code].item() for name, code in cameras.items()}
                yield {**cameras, "num_valid_queries": len(ranks), **mean_figures(scores)}
