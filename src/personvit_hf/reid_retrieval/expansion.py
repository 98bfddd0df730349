"""Changes to embeddings before they are compared: query expansion and camera bias; numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from .distances import as_array, embedding_array, host_array, row_norms

_BLOCK_ELEMENTS = 2**24


def expand_queries(query: Any, gallery: Any, k: int = 5, alpha: float = 0.0) -> np.ndarray:
    """Queries moved towards what they find: each the mean of itself and its nearest gallery entries.

    Args:
        query: (queries, dim) floating point. To expand the gallery too, give it here as well.
        gallery: (gallery, dim) floating point.
        k: How many gallery entries, by cosine similarity.
        alpha: Entries weigh their similarity to this power (negative ones nothing): 0 for average query expansion
            (AQE), 3 is usual for alpha-QE.

    Returns:
        float32 (queries, dim) with rows of length 1.

    Raises:
        ValueError: An argument has the wrong shape, type or range, or embeddings hold NaN or infinity.

    Source: Chum et al., "Total Recall", ICCV 2007 (AQE); Radenovic et al., "Fine-tuning CNN Image Retrieval with No
        Human Annotation", TPAMI 2018, section 3.4 (alpha-QE).
    """
    query, gallery = (_unit_rows(x, name) for x, name in ((query, "query"), (gallery, "gallery")))
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"`query` and `gallery` must have equal width, got {query.shape[1]} and {gallery.shape[1]}.")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(gallery):
        raise ValueError(f"`k` must be an integer from 1 to the {len(gallery)} gallery entries, got {k!r}.")
    if alpha < 0:
        raise ValueError(f"`alpha` must be at least 0, got {alpha}.")
    expanded = np.empty_like(query)
    step = max(1, _BLOCK_ELEMENTS // len(gallery))
    for start in range(0, len(query), step):
        part = query[start : start + step]
        similarities = part @ gallery.T
        nearest = np.argpartition(similarities, -k, axis=1)[:, -k:]
        weights = np.maximum(np.take_along_axis(similarities, nearest, axis=1), 0) ** np.float32(alpha)
        expanded[start : start + step] = part + np.einsum("qk,qkd->qd", weights, gallery[nearest])
    return _unit_rows(expanded, "query")


def remove_camera_bias(embeddings: Any, camera_ids: Any) -> np.ndarray:
    """Embeddings less the mean of their camera, which holds its light and background rather than anybody's looks.

    Args:
        embeddings: (images, dim) floating point; queries and gallery of the same cameras together.
        camera_ids: (images,) integers or strings. Cameras should see many people each: from a camera that saw one
            person alone, that person is what is taken away.

    Returns:
        float32 (images, dim) with rows of length 1.

    Raises:
        ValueError: An argument has the wrong shape or type, or embeddings hold NaN or infinity.
    """
    embeddings = _unit_rows(embeddings, "embeddings")
    cameras = as_array(camera_ids, "camera_ids", kinds="iuUO", ndim=1)
    if cameras.size != len(embeddings):
        raise ValueError(f"`camera_ids` must have {len(embeddings)} entries, one for each image; got {cameras.size}.")
    for camera in np.unique(cameras):
        of_camera = cameras == camera
        embeddings[of_camera] -= embeddings[of_camera].mean(axis=0, dtype=np.float64).astype(np.float32)
    return _unit_rows(embeddings, "embeddings")


def _unit_rows(values: Any, name: str) -> np.ndarray:
    """A float32 copy with rows of length 1; rows of zeros stay."""
    values = embedding_array(values, name)
    norms = row_norms(values, name)
    return (host_array(values) / np.maximum(norms, 1e-12)[:, None]).astype(np.float32)
