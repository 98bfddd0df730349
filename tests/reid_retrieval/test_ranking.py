import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from personvit_hf.reid_retrieval import ranking
from personvit_hf.reid_retrieval.ranking import evaluate_reid, pairwise_distances

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = {"query_person_ids": [1], "query_camera_ids": [0]}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "reid_eval.safetensors"), json.loads((GOLDEN / "reid_eval.json").read_text())["values"]


def golden_ids(tensors):
    return {
        "query_person_ids": tensors["q_pids"],
        "query_camera_ids": tensors["q_camids"],
        "gallery_person_ids": tensors["g_pids_raw"],
        "gallery_camera_ids": tensors["g_camids_raw"],
    }


def brute_force(distances, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank, ties):
    """The protocol once more, by sorting one query at a time."""
    precisions, penalties, curves, valid = [], [], [], []
    for query, person in enumerate(query_ids):
        entries = [
            (distance, right if ties == "pessimistic" else 0, index, right)
            for index, distance in enumerate(distances[query])
            for right in [gallery_ids[index] == person]
            if gallery_ids[index] != -1 and not (right and gallery_cameras[index] == query_cameras[query])
        ]
        hits = [right for *_, right in sorted(entries)]
        if person <= 0 or not any(hits):
            continue
        places = [place for place, right in enumerate(hits, start=1) if right]
        precisions.append(sum(found / place for found, place in enumerate(places, start=1)) / len(places))
        penalties.append(len(places) / places[-1])
        curves.append([float(places[0] <= k) for k in range(1, max_rank + 1)])
        valid.append(query)
    return precisions, penalties, curves, valid


def test_golden_distances(golden):
    tensors, values = golden
    figures = evaluate_reid(distances=tensors["distmat_raw"], **golden_ids(tensors))
    np.testing.assert_allclose(figures["average_precision"], tensors["all_AP"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(figures["mINP"], tensors["all_INP"].mean(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(figures["cmc"], tensors["cmc"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(figures["valid_queries"], tensors["valid_queries"])
    assert figures["average_precision"].dtype == np.float64
    assert (figures["num_valid_queries"], figures["num_queries"]) == (values["valid_queries"], values["queries"])
    assert figures["mAP"] == pytest.approx(values["mAP"], abs=1e-9)
    for name in ("rank1", "rank5", "rank10"):
        assert figures[name] == pytest.approx(values[name], abs=1e-6)


def test_golden_features(golden):
    tensors, values = golden
    queries = values["queries"]
    query, gallery = tensors["features"][:queries], tensors["features"][queries:]
    ids, cameras = tensors["features_pids"], tensors["features_camids"]
    figures = evaluate_reid(
        query,
        gallery,
        query_person_ids=ids[:queries],
        gallery_person_ids=ids[queries:],
        query_camera_ids=cameras[:queries],
        gallery_camera_ids=cameras[queries:],
    )
    assert figures["mAP"] == pytest.approx(values["features_mAP"], abs=1e-9)
    np.testing.assert_allclose(figures["cmc"], tensors["features_cmc"], rtol=0, atol=1e-6)
    # The reference's distance is the squared Euclidean one of unit vectors: twice ours.
    np.testing.assert_allclose(2 * pairwise_distances(query, gallery), tensors["features_distmat"], rtol=0, atol=1e-5)


@st.composite
def retrieval(draw):
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    queries, gallery = draw(st.integers(1, 8)), draw(st.integers(1, 40))
    people, cameras, levels = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 1000]))
    return {
        "distances": rng.integers(0, levels, (queries, gallery)) / np.float32(7),
        "query_person_ids": rng.integers(-1, people + 1, queries),
        "gallery_person_ids": rng.integers(-1, people + 1, gallery),
        "query_camera_ids": rng.integers(0, cameras, queries),
        "gallery_camera_ids": rng.integers(0, cameras, gallery),
    }


@settings(deadline=None, max_examples=300)
@given(case=retrieval(), max_rank=st.integers(1, 50), ties=st.sampled_from(["index", "pessimistic"]))
def test_equals_sorting(case, max_rank, ties):
    precisions, penalties, curves, valid = brute_force(*case_values(case), max_rank, ties)
    if not valid:
        with pytest.raises(ValueError, match="true match"):
            evaluate_reid(**case, max_rank=max_rank, ties=ties)
        return
    figures = evaluate_reid(**case, max_rank=max_rank, ties=ties)
    np.testing.assert_allclose(figures["average_precision"], precisions, rtol=1e-12)
    assert figures["mAP"] == pytest.approx(np.mean(precisions), abs=1e-12)
    assert figures["mINP"] == pytest.approx(np.mean(penalties), abs=1e-12)
    np.testing.assert_allclose(figures["cmc"], np.mean(curves, axis=0), rtol=1e-12)
    assert figures["valid_queries"].tolist() == valid
    assert figures["num_valid_queries"] == len(valid)


def case_values(case):
    names = ("distances", "query_person_ids", "gallery_person_ids", "query_camera_ids", "gallery_camera_ids")
    return [case[name] for name in names]


@settings(deadline=None, max_examples=100)
@given(case=retrieval(), seed=st.integers(0, 2**32 - 1))
def test_pessimistic_ties_do_not_know_the_gallery_order(case, seed):
    order = np.random.default_rng(seed).permutation(case["gallery_person_ids"].size)
    shuffled = {name: value[..., order] if "query" not in name else value for name, value in case.items()}
    try:
        figures = evaluate_reid(**case, ties="pessimistic")
    except ValueError:
        return
    again = evaluate_reid(**shuffled, ties="pessimistic")
    np.testing.assert_array_equal(figures["average_precision"], again["average_precision"])
    assert (figures["cmc"] == again["cmc"]).all()
    assert (figures["average_precision"] <= evaluate_reid(**case)["average_precision"] + 1e-12).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_chunks_do_not_change_the_figures(metric, monkeypatch):
    rng = np.random.default_rng(3)
    people = rng.normal(size=(12, 16)).astype(np.float32)
    query_ids, gallery_ids = rng.integers(0, 12, 30), rng.integers(0, 12, 90)
    query = people[query_ids]  # many exact duplicates: ties everywhere
    gallery = people[gallery_ids]
    ids = {
        "query_person_ids": query_ids,
        "gallery_person_ids": rng.integers(-1, 12, 90),
        "query_camera_ids": rng.integers(0, 3, 30),
        "gallery_camera_ids": rng.integers(0, 3, 90),
    }
    whole = evaluate_reid(query, gallery, metric=metric, **ids)
    given = evaluate_reid(distances=pairwise_distances(query, gallery, metric), **ids)
    for elements in (1, 200, 1000):
        monkeypatch.setattr(ranking, "CHUNK_ELEMENTS", elements)
        figures = evaluate_reid(query, gallery, metric=metric, **ids)
        np.testing.assert_array_equal(figures["average_precision"], whole["average_precision"])
    np.testing.assert_array_equal(given["average_precision"], whole["average_precision"])


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK_ELEMENTS", 20_000)
    rng = np.random.default_rng(0)
    query, gallery = (rng.normal(size=(n, 4)).astype(np.float32) for n in (2000, 2000))
    people = np.arange(2000) % 50 + 1
    tracemalloc.start()
    evaluate_reid(
        query,
        gallery,
        query_person_ids=people,
        gallery_person_ids=people,
        query_camera_ids=np.zeros(2000, dtype=int),
        gallery_camera_ids=np.ones(2000, dtype=int),
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # the whole float32 matrix alone is 16 MB


def test_distances_by_hand():
    query, gallery = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[6.0, 8.0], [-3.0, -4.0], [4.0, -3.0]])
    np.testing.assert_array_equal(pairwise_distances(query, gallery), np.float32([[0, 2, 1], [1, 1, 1]]))
    euclidean = pairwise_distances(query, gallery, "euclidean")
    np.testing.assert_array_equal(euclidean, np.float32([[25, 100, 50], [100, 25, 25]]))
    assert euclidean.dtype == np.float32


def test_equal_embeddings_are_at_equal_distances():
    x = np.random.default_rng(5).normal(size=(64, 33)).astype(np.float32)
    distances = pairwise_distances(x, np.concatenate([x, x]))
    assert (np.diagonal(distances) == 0).all()
    np.testing.assert_array_equal(distances[:, :64], distances[:, 64:])


def test_protocol_by_hand():
    figures = evaluate_reid(
        distances=[[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]],
        query_person_ids=[1, 9],
        query_camera_ids=[0, 0],
        gallery_person_ids=[-1, 1, 0, 1, 2, 1],  # junk, own camera, distractor, match, other, match
        gallery_camera_ids=[1, 0, 1, 1, 1, 2],
    )
    assert figures["average_precision"].tolist() == pytest.approx([(1 / 2 + 2 / 4) / 2])
    assert figures["mINP"] == pytest.approx(2 / 4)
    assert figures["cmc"].tolist() == [0.0] + [1.0] * 49
    assert (figures["num_queries"], figures["num_valid_queries"]) == (2, 1)
    assert figures["valid_queries"].tolist() == [0]


def test_queries_that_are_nobody_are_left_out(caplog):
    figures = evaluate_reid(
        distances=np.zeros((3, 2)),
        query_person_ids=[0, -1, 4],
        query_camera_ids=[0, 0, 0],
        gallery_person_ids=[0, 4],
        gallery_camera_ids=[1, 1],
    )
    assert figures["valid_queries"].tolist() == [2]
    assert "2 queries" in caplog.text


def test_ties_by_hand():
    case = {**IDS, "distances": np.zeros((1, 3)), "gallery_person_ids": [2, 1, 3], "gallery_camera_ids": [1, 1, 1]}
    assert evaluate_reid(**case)["mAP"] == pytest.approx(1 / 2)
    assert evaluate_reid(**case, ties="pessimistic")["mAP"] == pytest.approx(1 / 3)


def test_torch_tensors_give_the_same():
    rng = np.random.default_rng(1)
    query, gallery = (torch.tensor(rng.normal(size=(n, 8)), dtype=torch.bfloat16) for n in (4, 20))
    ids = {
        "query_person_ids": torch.arange(1, 5),
        "gallery_person_ids": torch.arange(20) % 4 + 1,
        "query_camera_ids": torch.zeros(4, dtype=torch.int32),
        "gallery_camera_ids": torch.ones(20, dtype=torch.int32),
    }
    figures = evaluate_reid(query.requires_grad_(), gallery, **ids)
    expected = evaluate_reid(query.detach().float().numpy(), gallery.float().numpy(), **ids)
    assert figures["mAP"] == expected["mAP"]
    doubles = torch.tensor(rng.normal(size=(4, 20)))
    assert evaluate_reid(distances=doubles, **ids)["mAP"] == evaluate_reid(distances=doubles.numpy(), **ids)["mAP"]


GOOD = {
    "query_embeddings": np.eye(2),
    "gallery_embeddings": np.eye(3, 2),
    "query_person_ids": [1, 2],
    "gallery_person_ids": [1, 2, 3],
    "query_camera_ids": [0, 0],
    "gallery_camera_ids": [1, 1, 1],
}
NAN = np.array([[1.0, 0.0], [np.nan, 0.0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_embeddings": NAN}, "query_embeddings.*NaN.*row 1"),
        ({"gallery_embeddings": np.full((3, 2), np.inf)}, "gallery_embeddings.*infinity.*row 0"),
        ({"query_embeddings": np.eye(3, 2)}, "query_embeddings.*3 rows.*has 2"),
        ({"gallery_embeddings": np.eye(2)}, "gallery_embeddings.*2 rows.*has 3"),
        ({"gallery_embeddings": np.eye(3)}, "equal width, got 2 and 3"),
        ({"query_embeddings": np.ones(2)}, "query_embeddings.*2 axes"),
        ({"query_embeddings": np.eye(2, dtype=int)}, "query_embeddings.*floating point"),
        ({"query_embeddings": [[1.0], [1.0, 2.0]]}, "query_embeddings.*regular"),
        ({"query_embeddings": None}, "Give `query_embeddings`"),
        ({"distances": np.zeros((2, 3))}, "not both"),
        ({"query_person_ids": [1.0, 2.0]}, "query_person_ids.*integers.*float64"),
        ({"gallery_person_ids": [1, 2, -2]}, "gallery_person_ids.*at least -1.*got -2"),
        ({"query_person_ids": []}, "query_person_ids.*non-empty"),
        ({"query_camera_ids": [0]}, "query_camera_ids.*2 entries.*got 1"),
        ({"gallery_camera_ids": ["a", "b", "c"]}, "gallery_camera_ids.*integers"),
        ({"metric": "manhattan"}, "metric.*manhattan"),
        ({"ties": "random"}, "ties.*random"),
        ({"max_rank": 0}, "max_rank.*0"),
        ({"gallery_camera_ids": [0, 0, 0]}, "None of the 2 queries"),
        ({"gallery_person_ids": [-1, -1, -1]}, "None of the 2 queries"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_reid(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        (np.array([[0, 1, 2], [0, np.nan, 1]]), "distances.*NaN.*row 1"),
        (np.zeros((3, 2)), r"distances.*\(2, 3\).*got \(3, 2\)"),
        (np.zeros((2, 3), dtype=bool), "distances.*real numbers"),
    ],
)
def test_bad_distances(distances, message):
    case = {name: value for name, value in GOOD.items() if "embeddings" not in name}
    with pytest.raises(ValueError, match=message):
        evaluate_reid(distances=distances, **case)
