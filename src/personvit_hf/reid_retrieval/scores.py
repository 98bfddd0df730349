"""From the ranks of true matches to figures: means, confidence intervals, groups and the ROC curve; numpy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Distances are told apart by this many equal steps of their range when false accepts are counted.
ROC_BINS = 2**20
_ROC_PIECE = 2**21


@dataclass(frozen=True)
class QueryScores:
    """One entry for each valid query.

    Attributes:
        queries: int64 (valid queries,), indices among all queries.
        average_precision: float64, mean of precision at each true match.
        inverse_negative_penalty: float64, true matches per rank of the last of them.
        first_match_rank: int64, rank of the nearest true match, from 1.
    """

    queries: np.ndarray
    average_precision: np.ndarray
    inverse_negative_penalty: np.ndarray
    first_match_rank: np.ndarray

    @classmethod
    def of(cls, ranks_by_query: dict[int, np.ndarray]) -> QueryScores:
        """From the zero-based ranks of each query's true matches, ascending."""
        ranks = list(ranks_by_query.values())
        return cls(
            np.array(list(ranks_by_query), dtype=np.int64),
            np.array([np.mean(np.arange(1, r.size + 1) / (r + 1)) for r in ranks]),
            np.array([r.size / (r[-1] + 1) for r in ranks]),
            np.array([r[0] + 1 for r in ranks], dtype=np.int64),
        )

    def by_query(self) -> dict[str, np.ndarray]:
        """Each query's share in the figures that are means over queries."""
        hits = {f"rank{k}": (self.first_match_rank <= k).astype(np.float64) for k in (1, 5, 10)}
        return {"mAP": self.average_precision, "mINP": self.inverse_negative_penalty, **hits}


def mean_figures(scores: QueryScores, of: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """mAP, mINP, rank1, rank5 and rank10 of some of the valid queries (a mask, or all)."""
    return {name: float(values[of].mean()) for name, values in scores.by_query().items()}


def cmc_curve(scores: QueryScores, max_rank: int) -> np.ndarray:
    """(max_rank,) share of valid queries whose first true match is among the first k, for k from 1."""
    ranks = np.sort(scores.first_match_rank)
    return np.searchsorted(ranks, np.arange(1, max_rank + 1), side="right") / ranks.size


def bootstrap_intervals(
    scores: QueryScores, person_ids: np.ndarray, resamples: int, confidence: float, seed: int
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the figures over resampled identities.

    Identities are drawn with replacement, each with all its queries: queries of one person succeed and fail together,
    so drawing single queries would make the intervals too narrow.

    Args:
        scores: The valid queries' scores.
        person_ids: (valid queries,) integers.
        resamples: How many samples of identities to draw.
        confidence: Share of the samples inside an interval, in (0, 1).
        seed: Seed of the draws.

    Returns:
        (low, high) for each of mAP, mINP, rank1, rank5 and rank10.

    Raises:
        ValueError: There is one identity only, or a setting is out of its range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")
    people, of_query = np.unique(person_ids, return_inverse=True)
    if people.size < 2:
        raise ValueError("`bootstrap` resamples identities and needs at least 2 with a valid query; there is 1.")
    generator = np.random.default_rng(seed)
    times_drawn = generator.multinomial(people.size, np.full(people.size, 1 / people.size), size=resamples)
    num_queries = times_drawn @ np.bincount(of_query)
    edges = [(1 - confidence) / 2, (1 + confidence) / 2]
    intervals = {}
    for name, values in scores.by_query().items():
        means = times_drawn @ np.bincount(of_query, weights=values) / num_queries
        low, high = np.quantile(means, edges)
        intervals[name] = (float(low), float(high))
    return intervals


def checked_groups(query_groups: Any, num_queries: int) -> dict[str, np.ndarray]:
    """The labels of all queries, by name, as arrays of strings, numbers or bools.

    Raises:
        ValueError: They are no mapping, or there isn't one label for each query.
    """
    if not isinstance(query_groups, Mapping):
        raise ValueError(
            f"`query_groups` must be a dict of labels by name, such as {{'occlusion': labels}}, got a "
            f"{type(query_groups).__name__}."
        )
    groups = {}
    for name, labels in query_groups.items():
        array = np.asarray(labels)
        if array.shape != (num_queries,):
            raise ValueError(f"`query_groups[{name!r}]` must have {num_queries} entries, got shape {array.shape}.")
        kind = array.dtype.kind
        if kind in "UO" and all(isinstance(label, str) for label in labels):
            array = array.astype(np.str_)
        elif kind not in "biuf" or (kind == "f" and np.isnan(array).any()):
            raise ValueError(
                f"`query_groups[{name!r}]` must hold strings or numbers for all queries; it mixes them or holds None, "
                "NaN or others. Give queries without a label one of their own."
            )
        groups[name] = array
    return groups


def group_figures(scores: QueryScores, labels: np.ndarray, name: str) -> list[dict[str, Any]]:
    """Figures of the valid queries with each label of all queries, one row for each label in sorted order."""
    labels = labels[scores.queries]
    rows = []
    for label in np.unique(labels):
        members = labels == label
        rows.append({name: label.item(), "num_valid_queries": int(members.sum()), **mean_figures(scores, members)})
    return rows


class RocCounts:
    """True and false accepts at every threshold, counted in `ROC_BINS` equal steps between two distances.

    Args:
        limits: Smallest and largest distance; what lies outside counts as on the limit.
    """

    def __init__(self, limits: tuple[float, float]):
        self.low, high = limits
        # also where all finite distances are equal not 0, which makes NaN of infinities
        self.bins_per_unit = ROC_BINS / (high - self.low or 1.0)
        self.matches = np.zeros(ROC_BINS, np.int64)
        self.others = np.zeros(ROC_BINS, np.int64)

    def add(self, counts: np.ndarray, distances: np.ndarray) -> None:
        """Adds distances of any shape to `matches` or `others`; NaN stands for pairs that don't count."""
        for piece in np.array_split(distances.ravel(), max(1, distances.size // _ROC_PIECE)):
            piece = piece[~np.isnan(piece)]
            bins = np.clip((piece - self.low) * self.bins_per_unit, 0, ROC_BINS - 1).astype(np.int64)
            counts += np.bincount(bins, minlength=ROC_BINS)

    def true_positive_rates(self, false_positive_rates: Sequence[float]) -> np.ndarray:
        """Largest share of true matches accepted while no more than each share of the others is.

        Raises:
            ValueError: A rate is not in [0, 1].
        """
        rates = np.asarray(false_positive_rates, dtype=np.float64)
        if rates.ndim != 1 or not ((rates >= 0) & (rates <= 1)).all():
            raise ValueError(f"`false_positive_rates` must be a list of shares in [0, 1], got {false_positive_rates}.")
        matches, others = np.cumsum(self.matches), np.cumsum(self.others)
        last = np.searchsorted(others / max(others[-1], 1), rates, side="right") - 1
        return np.where(last >= 0, matches[last] / matches[-1], 0.0)
