"""The figures of `evaluate_reid` as a metric for `evaluate.load("<folder of this file>")`."""

from typing import Any

import datasets
import evaluate
import numpy as np

# `evaluate.load` copies the files that this one imports, and no others: all of the folder stand here.
from .counting import match_ranks
from .distances import pairwise_distances
from .expansion import expand_queries
from .ids import RetrievalIds
from .ranking import evaluate_reid
from .reranking import rerank
from .scores import QueryScores

__all__ = [
    "QueryScores",
    "ReIDRetrieval",
    "RetrievalIds",
    "evaluate_reid",
    "expand_queries",
    "match_ranks",
    "pairwise_distances",
    "rerank",
]

_DESCRIPTION = "mAP, CMC and mINP of person re-identification under the Market-1501 protocol."

_INPUTS_DESCRIPTION = """
Args:
    predictions: embeddings, one row of floats per image; queries and gallery together, in any order.
    person_ids: integer per image; 1 and above identities, 0 distractors, -1 junk.
    camera_ids: integer per image.
    is_query: bool per image; False is a gallery image.
    metric: "cosine" (default) or "euclidean".
    max_rank: length of the CMC curve, 50 by default.
    ties: order of equal distances, "index" (default) or "pessimistic".
Returns:
    The dict of `personvit_hf.evaluate_reid`, with lists for its arrays: mAP, mINP, cmc, rank1, rank5, rank10,
    average_precision, valid_queries (indices among the queries), num_valid_queries, num_queries.
Example:
    >>> metric = evaluate.load("path/of/reid_retrieval")
    >>> metric.compute(predictions=[[1.0, 0.0], [0.9, 0.1]], person_ids=[1, 1], camera_ids=[0, 1],
    ...                is_query=[True, False])
"""

_CITATION = """
@inproceedings{zheng2015scalable,
  title={Scalable Person Re-identification: A Benchmark},
  author={Zheng, Liang and Shen, Liyue and Tian, Lu and Wang, Shengjin and Wang, Jingdong and Tian, Qi},
  booktitle={ICCV}, year={2015}}
"""


class ReIDRetrieval(evaluate.Metric):
    """Thin metric around `ranking.evaluate_reid`; big galleries are better given to that function directly."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "person_ids": datasets.Value("int64"),
                    "camera_ids": datasets.Value("int64"),
                    "is_query": datasets.Value("bool"),
                }
            ),
        )

    def _compute(self, predictions: Any, person_ids: Any, camera_ids: Any, is_query: Any, **options: Any) -> dict:
        embeddings = np.array(list(predictions), dtype=np.float32)
        person_ids, camera_ids, is_query = (np.array(list(rows)) for rows in (person_ids, camera_ids, is_query))
        if is_query.all() or not is_query.any():
            raise ValueError(
                "`is_query` must be True for the queries and False for the gallery; one of them is empty."
            )
        figures = evaluate_reid(
            embeddings[is_query],
            embeddings[~is_query],
            query_person_ids=person_ids[is_query],
            gallery_person_ids=person_ids[~is_query],
            query_camera_ids=camera_ids[is_query],
            gallery_camera_ids=camera_ids[~is_query],
            **options,
        )
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in figures.items()}
