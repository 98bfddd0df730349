"""Person and camera ids of queries and gallery: checks, and strings as numbers; numpy alone."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from .distances import as_array

logger = logging.getLogger(__name__)

JUNK_ID = -1
DISTRACTOR_ID = 0

_NOBODY = re.compile(r"-\d+|0+")


@dataclass(frozen=True)
class RetrievalIds:
    """Who and where: int64, one entry for each query or gallery entry.

    Attributes:
        query_people: (queries,), -1 junk, 0 distractor, 1 and above identities.
        gallery_people: (gallery,), likewise.
        query_cameras: (queries,), indices into `cameras`.
        gallery_cameras: (gallery,), indices into `cameras`.
        cameras: The camera ids as they were given, each once.
        across_cameras: Whether matches in the query's own camera are ignored.
    """

    query_people: np.ndarray
    gallery_people: np.ndarray
    query_cameras: np.ndarray
    gallery_cameras: np.ndarray
    cameras: np.ndarray
    across_cameras: bool

    @classmethod
    def of(
        cls, query_people: Any, gallery_people: Any, query_cameras: Any, gallery_cameras: Any, protocol: str
    ) -> RetrievalIds:
        """Checks ids as `evaluate_reid` takes them.

        Raises:
            ValueError: One has the wrong shape, type or range, or camera ids are missing where they are needed.
        """
        query_people = _id_array(query_people, "query_person_ids")
        gallery_people = _id_array(gallery_people, "gallery_person_ids")
        sizes = query_people.size, gallery_people.size
        if protocol not in ("cross_camera", "any_camera"):
            raise ValueError(f'`protocol` must be "cross_camera" or "any_camera", got {protocol!r}.')
        across_cameras = protocol == "cross_camera"
        if query_cameras is None and gallery_cameras is None:
            if across_cameras:
                raise ValueError(
                    "`query_camera_ids` and `gallery_camera_ids` are missing, and the protocol ignores matches in the "
                    'query\'s own camera. Give them, or choose `protocol="any_camera"`, which ignores none.'
                )
            query_cameras, gallery_cameras = np.zeros(sizes[0], np.int64), np.zeros(sizes[1], np.int64)
        query_cameras = _id_array(query_cameras, "query_camera_ids", sizes[0])
        gallery_cameras = _id_array(gallery_cameras, "gallery_camera_ids", sizes[1])
        _require_one_kind(query_cameras, gallery_cameras, "camera_ids")
        cameras, codes = np.unique(np.concatenate([query_cameras, gallery_cameras]), return_inverse=True)
        people = _person_codes(query_people, gallery_people)
        nobodies = int((people[0] <= DISTRACTOR_ID).sum())
        if nobodies:
            logger.warning("%d queries have person_id -1 or 0, which are no identities: they are left out.", nobodies)
        return cls(*people, codes[: sizes[0]], codes[sizes[0] :], cameras, across_cameras)

    def subset(self, queries: np.ndarray, gallery: np.ndarray) -> RetrievalIds:
        """The ids of some queries and some gallery entries."""
        people = self.query_people[queries], self.gallery_people[gallery]
        cameras = self.query_cameras[queries], self.gallery_cameras[gallery]
        return RetrievalIds(*people, *cameras, self.cameras, self.across_cameras)


def _id_array(values: Any, name: str, length: int | None = None) -> np.ndarray:
    """`values` as int64 or as strings."""
    if values is None:
        raise ValueError(f"`{name}` is missing.")
    array = as_array(values, name, kinds="iuUO", ndim=1)
    if length is not None and array.size != length:
        raise ValueError(f"`{name}` must have {length} entries, as many as there are person ids; got {array.size}.")
    if array.dtype.kind == "O" and not all(isinstance(value, str) for value in array):
        raise ValueError(f"`{name}` must hold integers or strings; it mixes them or holds others.")
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"`{name}` must hold integers of 64 bits with a sign, got {array.max()}.")
    return array.astype(np.str_ if array.dtype.kind in "UO" else np.int64)


def _require_one_kind(query: np.ndarray, gallery: np.ndarray, name: str) -> None:
    if query.dtype.kind != gallery.dtype.kind:
        kinds = {"i": "integers", "U": "strings"}
        raise ValueError(
            f"`query_{name}` and `gallery_{name}` must both hold integers or both strings, got "
            f"{kinds[query.dtype.kind]} and {kinds[gallery.dtype.kind]}."
        )


def _person_codes(query: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Person ids as integers that mean the same: strings get numbers from 1, "-1" and "0" their value."""
    _require_one_kind(query, gallery, "person_ids")
    if query.dtype.kind == "U":
        texts, codes = np.unique(np.concatenate([query, gallery]), return_inverse=True)
        values = np.array([int(text) if _NOBODY.fullmatch(text) else i for i, text in enumerate(texts, start=1)])
        query, gallery = np.split(values[codes], [query.size])
    for array, name in ((query, "query"), (gallery, "gallery")):
        if array.min() < JUNK_ID:
            raise ValueError(f"`{name}_person_ids` must be at least {JUNK_ID} (junk), got {array.min()}.")
    return query, gallery
