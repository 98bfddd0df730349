from dataclasses import replace

import numpy as np
import pytest
import torch

from personvit_hf.reid_retrieval.distances import EmbeddingDistances, GivenDistances, pairwise_distances


def embeddings(kind):
    rng = np.random.default_rng(0)
    query, gallery = (rng.normal(size=(n, 384)) for n in (20, 300))
    changes = {
        "plain": lambda x: x,
        "around one point": lambda x: 1 + 1e-3 * x,
        "one point": lambda x: np.ones_like(x),  # errors of all terms add up
        "of all lengths": lambda x: x * 10 ** rng.uniform(-6, 6, (len(x), 1)),
        "huge": lambda x: x * 1e16,
        "tiny": lambda x: x * 1e-20,
    }
    return changes[kind](query).astype(np.float32), changes[kind](gallery).astype(np.float32)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", ["plain", "around one point", "one point", "of all lengths", "huge", "tiny"])
def test_blocks_are_within_the_tolerance(metric, kind):
    pairs = EmbeddingDistances.of(*embeddings(kind), metric)
    queries = np.arange(3, 17)
    exact = np.stack([pairs.exact(query, np.arange(300)) for query in queries])
    for columns in (slice(0, 300), np.arange(0, 300, 3)):
        block = pairs.block(pairs.query_block(queries), pairs.gallery_block(columns))
        assert block.dtype == np.float32
        errors = block + pairs.offsets(queries)[:, None] - exact[:, columns] / pairs.unit
        assert np.abs(errors).max() <= pairs.tolerance
    np.testing.assert_allclose(pairs.exact_block(queries, np.arange(300)), exact, rtol=1e-6, atol=1e-7 * pairs.unit)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", ["plain", "around one point", "one point", "of all lengths", "huge", "tiny"])
def test_blocks_on_a_gpu_are_the_exact_ones(metric, kind):
    pairs = EmbeddingDistances.of(*embeddings(kind), metric)
    pairs = replace(pairs, on_gpu=(torch.from_numpy(pairs.query), torch.from_numpy(pairs.gallery)))
    queries = np.arange(3, 17)
    for columns in (np.arange(300), np.arange(0, 300, 3)):
        found = pairs.exact_block_on_gpu(queries, columns).numpy()
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, pairs.exact_block(queries, columns), rtol=1e-6, atol=0)
    part = pairs.subset(np.array([5, 3]), np.array([7, 1]))
    np.testing.assert_array_equal(
        part.exact_block_on_gpu(np.array([1]), slice(0, 1))[0], pairs.exact(3, np.array([7]))
    )


def test_exact_distances_are_those_of_pairwise_distances():
    query, gallery = embeddings("plain")
    for metric in ("cosine", "euclidean"):
        pairs = EmbeddingDistances.of(query, gallery, metric)
        exact = np.stack([pairs.exact(i, np.arange(300)) for i in range(20)])
        np.testing.assert_array_equal(exact, pairwise_distances(query, gallery, metric))
        part = pairs.subset(np.array([3, 5]), np.array([7, 1, 0]))
        np.testing.assert_array_equal(part.exact(1, np.array([0, 2])), exact[5, [7, 0]])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_given_distances_keep_their_values(dtype):
    matrix = np.arange(12).reshape(3, 4).astype(dtype)
    pairs = GivenDistances.of(matrix, (3, 4))
    block = pairs.block(pairs.query_block(np.array([2, 0])), np.array([1, 3]))
    assert block.tolist() == [[9, 11], [1, 3]]
    block[:] = np.nan  # a copy
    assert pairs.exact(2, np.array([3, 0])).tolist() == [11, 8]
    assert pairs.limits == (0, 11)
