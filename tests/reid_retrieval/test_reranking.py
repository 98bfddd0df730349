import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from personvit_hf.reid_retrieval import reranking
from personvit_hf.reid_retrieval.ranking import evaluate_reid
from personvit_hf.reid_retrieval.reranking import rerank

GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS = [(20, 6, 0.3), (50, 15, 0.3), (20, 1, 0.3), (15, 6, 0)]


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "reid_rerank.safetensors"), json.loads((GOLDEN / "reid_rerank.json").read_text())[
        "values"
    ]


@pytest.mark.parametrize("settings", SETTINGS)
def test_golden(golden, settings):
    tensors, values = golden
    name = "k1_{}.k2_{}.lambda_{}".format(*settings)
    distances = rerank(tensors["query"], tensors["gallery"], *settings)
    assert distances.dtype == np.float32
    np.testing.assert_allclose(distances, tensors[f"fastreid.{name}"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(distances, tensors[f"official.{name}"], rtol=0, atol=1e-2)
    figures = evaluate_reid(
        distances=distances,
        query_person_ids=tensors["q_pids"] + 1,  # counted from 0 there, our distractor
        gallery_person_ids=tensors["g_pids"] + 1,
        protocol="any_camera",
    )
    assert figures["mAP"] == pytest.approx(values[name]["fastreid"]["mAP"], abs=1e-6)
    assert figures["rank1"] == pytest.approx(values[name]["fastreid"]["rank1"], abs=1e-6)


def dense_rerank(query, gallery, k1, k2, lambda_value):
    """The paper's formulas with sets and whole matrices, in float64."""
    images = np.concatenate([query, gallery]).astype(np.float64)
    squared = np.square(images[:, None] - images[None]).sum(axis=2)
    scaled = squared / squared.max(axis=1, keepdims=True)
    order = np.argsort(squared, axis=1, kind="stable")

    def mutual(image, k):
        return {j for j in order[image, : k + 1].tolist() if image in order[j, : k + 1]}

    half = int(np.around(k1 / 2))
    codes = np.zeros_like(squared)
    for image in range(len(images)):
        own = mutual(image, k1)
        expanded = set(own)
        for candidate in own:
            theirs = mutual(candidate, half)
            if len(theirs & own) > 2 / 3 * len(theirs):
                expanded |= theirs
        members = sorted(expanded)
        codes[image, members] = np.exp(-scaled[image, members])
        codes[image] /= codes[image].sum()
    codes = np.stack([codes[order[image, :k2]].mean(axis=0) for image in range(len(images))])
    smaller = np.minimum(codes[: len(query), None], codes[None, len(query) :]).sum(axis=2)
    larger = np.maximum(codes[: len(query), None], codes[None, len(query) :]).sum(axis=2)
    return (1 - lambda_value) * (1 - smaller / larger) + lambda_value * scaled[: len(query), len(query) :]


def clustered(seed, queries=15, gallery=45, people=6, dim=12):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(people, dim))
    draws = (centers[rng.integers(0, people, n)] + 0.7 * rng.normal(size=(n, dim)) for n in (queries, gallery))
    return [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in draws]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    k1=st.integers(1, 30),
    k2=st.integers(1, 8),
    lambda_value=st.sampled_from([0, 0.3, 1]),
    block_rows=st.sampled_from([7, 16, 4096]),
    scratch=st.sampled_from([1, 500, 2**20]),
)
def test_equals_the_dense_formulas(seed, k1, k2, lambda_value, block_rows, scratch):
    query, gallery = clustered(seed)
    k2 = min(k2, k1 + 1)
    expected = dense_rerank(query, gallery, k1, k2, lambda_value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reranking, "BLOCK_ROWS", block_rows)
        patch.setattr(reranking, "_SCRATCH_ELEMENTS", scratch)
        patch.setattr(reranking, "_CACHED_ELEMENTS", scratch)
        patch.setattr(reranking, "_SAMPLE", 40)
        found = rerank(query, gallery, k1, k2, lambda_value)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_embeddings_are_taken_as_they_are():
    query, gallery = clustered(0)
    far = np.float32(3) * query + 100, np.float32(3) * gallery + 100  # the same but for scale and place
    np.testing.assert_allclose(rerank(*far), rerank(query, gallery), rtol=0, atol=1e-4)


def test_images_of_other_kinds_and_an_own_place_for_the_result(tmp_path):
    query, gallery = clustered(1)
    expected = rerank(query, gallery)
    np.testing.assert_array_equal(rerank(torch.from_numpy(query), torch.from_numpy(gallery)), expected)
    np.testing.assert_allclose(rerank(query.astype(np.float64), gallery.tolist()), expected, rtol=0, atol=1e-6)
    np.save(tmp_path / "gallery.npy", gallery)
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.float32, expected.shape)
    assert rerank(query, np.load(tmp_path / "gallery.npy", mmap_mode="r"), out=out) is out
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_neighbours_on_a_gpu_are_those_in_main_memory(monkeypatch):
    """Tensors that are in main memory after all take the way."""
    monkeypatch.setattr(reranking, "_GPU_ELEMENTS", 7 * 400)  # some rows at a time
    query, gallery = clustered(1)
    vectors = reranking._augmented(query, gallery)
    out = np.empty((2, len(query), len(gallery)), np.float32)
    indices, longest = reranking._neighbours(vectors, 21, out[0])
    found = reranking._neighbours_on_gpu(torch.from_numpy(vectors), 21, out[1])
    np.testing.assert_array_equal(found[0], indices)
    np.testing.assert_allclose(found[1], longest, rtol=1e-5)
    np.testing.assert_allclose(out[1], out[0], rtol=0, atol=1e-5 * longest.max())
    equal = torch.from_numpy(reranking._augmented(np.ones((3, 4), np.float32), np.ones((30, 4), np.float32)))
    indices, _ = reranking._neighbours_on_gpu(equal, 21, np.empty((3, 30), np.float32))
    assert (indices == np.arange(21)).all()


@pytest.mark.gpu
def test_cuda_tensors_agree():
    query, gallery = clustered(1)
    found = rerank(torch.from_numpy(query).cuda(), torch.from_numpy(gallery).cuda())
    np.testing.assert_allclose(found, rerank(query, gallery), rtol=0, atol=1e-5)


def test_duplicates_of_all():
    """Everybody is everybody's neighbour at distance 0: no division by zero, nobody is preferred but by index."""
    distances = rerank(np.ones((3, 4), np.float32), np.ones((40, 4), np.float32))
    assert np.isfinite(distances).all()
    assert distances.min() >= 0


@pytest.mark.parametrize("k2", [1, 6])
def test_duplicates_that_are_nobodys_neighbours(k2, monkeypatch):
    """All of them have the first 21 as nearest, so that most have no mutual neighbour, not even themselves."""
    monkeypatch.setattr(reranking, "_SCRATCH_ELEMENTS", 1)
    monkeypatch.setattr(reranking, "_CACHED_ELEMENTS", 1)
    distances = rerank(np.ones((30, 4), np.float32), np.ones((60, 4), np.float32), k2=k2)
    assert ((distances >= 0) & (distances <= 1)).all()


def test_memory_is_far_below_images_times_images(monkeypatch):
    monkeypatch.setattr(reranking, "BLOCK_ROWS", 256)
    monkeypatch.setattr(reranking, "_SCRATCH_ELEMENTS", 2**18)
    query, gallery = clustered(2, queries=100, gallery=3900, people=200)
    tracemalloc.start()
    rerank(query, gallery)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # one float32 matrix of all with all is 64 MB, the result 1.6 MB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.full((2, 3), np.nan)}, "query.*NaN"),
        ({"gallery": np.full((4, 3), np.inf)}, "gallery.*infinity"),
        ({"gallery": np.empty((0, 3))}, "gallery.*non-empty"),
        ({"gallery": np.eye(4)}, "equal width, got 3 and 4"),
        ({"query": np.eye(3, dtype=int)}, "query.*floating point"),
        ({"k1": 7}, "k1.*from 1 to 6.*got 7"),
        ({"k1": 0}, "k1.*got 0"),
        ({"k1": 2.5}, "k1.*got 2.5"),
        ({"k2": 4}, "k2.*from 1 to 3.*got 4"),
        ({"lambda_value": 1.5}, "lambda_value.*1.5"),
        ({"out": np.zeros((3, 3), np.float32)}, r"out.*\(3, 4\)"),
        ({"out": np.zeros((3, 4))}, "out.*float32.*float64"),
    ],
)
def test_bad_input(change, message):
    good = {"query": np.eye(3), "gallery": np.eye(4, 3), "k1": 2, "k2": 1}
    with pytest.raises(ValueError, match=message):
        rerank(**{**good, **change})
