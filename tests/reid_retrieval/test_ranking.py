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
METRICS = st.sampled_from(["cosine", "euclidean"])
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
    query, gallery = (rng.normal(size=(n, 4)).astype(np.float32) for n in (3000, 3000))
    people = np.arange(3000) % 300 + 1
    tracemalloc.start()
    evaluate_reid(
        query,
        gallery,
        query_person_ids=people,
        gallery_person_ids=people,
        query_camera_ids=np.zeros(3000, dtype=int),
        gallery_camera_ids=np.ones(3000, dtype=int),
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # the whole float32 matrix alone is 36 MB


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


def clustered(seed, queries=40, gallery=150, people=12, dim=24, noise=0.6):
    """Embeddings with some order in them, ids with junk and distractors, cameras."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(people + 1, dim))
    case = {}
    for name, size in (("query", queries), ("gallery", gallery)):
        ids = rng.integers(-1 if name == "gallery" else 1, people + 1, size)
        case[f"{name}_embeddings"] = (centers[ids] + noise * rng.normal(size=(size, dim))).astype(np.float32)
        case[f"{name}_person_ids"] = ids
        case[f"{name}_camera_ids"] = rng.integers(0, 3, size)
    return case


def with_gallery(case, index):
    return {name: value[index] if "gallery" in name else value for name, value in case.items()}


def plain_scores(case, metric, ties="index"):
    """The protocol by sorting float64 distances that numpy alone computes."""
    query, gallery = (case[f"{name}_embeddings"].astype(np.float64) for name in ("query", "gallery"))
    if metric == "cosine":
        query, gallery = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, gallery))
        distances = (1 - (query @ gallery.T).astype(np.float32)).astype(np.float32)
    else:
        distances = np.square(query[:, None] - gallery[None]).sum(axis=2).astype(np.float32)
    names = ("query_person_ids", "gallery_person_ids", "query_camera_ids", "gallery_camera_ids")
    return brute_force(distances, *(case[name] for name in names), 50, ties)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    metric=METRICS,
    ties=st.sampled_from(["index", "pessimistic"]),
    # so close together that float32 products can't tell who is nearer; or all the same
    spread=st.sampled_from([1, 1e-3, 1e-5, 0]),
    chunk_elements=st.sampled_from([300, 10**6]),
)
def test_equals_sorting_where_float32_cannot_tell(seed, metric, ties, spread, chunk_elements):
    case = clustered(seed)
    for name in ("query_embeddings", "gallery_embeddings"):
        case[name] = np.float32(1) + np.float32(spread) * case[name]
    precisions, penalties, curves, valid = plain_scores(case, metric, ties)
    figures = evaluate_reid(**case, metric=metric, ties=ties, chunk_elements=chunk_elements)
    assert figures["valid_queries"].tolist() == valid
    np.testing.assert_allclose(figures["average_precision"], precisions, rtol=0, atol=1e-6)
    np.testing.assert_allclose(figures["cmc"], np.mean(curves, axis=0), rtol=0, atol=1e-6)
    assert figures["mINP"] == pytest.approx(np.mean(penalties), abs=1e-6)
    assert np.minimum(figures["first_match_rank"], 51).tolist() == [51 - int(sum(curve)) for curve in curves]


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    chunk_elements=st.integers(200, 5000),
    metric=METRICS,
)
def test_gallery_order_and_chunks_change_nothing(seed, chunk_elements, metric):
    case = clustered(seed)
    order = np.random.default_rng(seed).permutation(150)
    figures = evaluate_reid(**case, metric=metric)
    again = evaluate_reid(**with_gallery(case, order), metric=metric, chunk_elements=chunk_elements)
    np.testing.assert_array_equal(figures["average_precision"], again["average_precision"])
    np.testing.assert_array_equal(figures["cmc"], again["cmc"])


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), ties=st.sampled_from(["index", "pessimistic"]))
def test_a_distractor_never_raises_average_precision(seed, ties):
    case = clustered(seed)
    rng = np.random.default_rng(seed)
    more = {
        **case,
        "gallery_embeddings": np.concatenate(
            [case["gallery_embeddings"], case["query_embeddings"][rng.integers(40, size=5)]]
        ),
        "gallery_person_ids": np.concatenate([case["gallery_person_ids"], np.zeros(5, int)]),
        "gallery_camera_ids": np.concatenate([case["gallery_camera_ids"], np.zeros(5, int)]),
    }
    before, after = evaluate_reid(**case, ties=ties), evaluate_reid(**more, ties=ties)
    assert (after["average_precision"] <= before["average_precision"]).all()
    assert after["mAP"] < before["mAP"]


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), metric=METRICS)
def test_perfect_features_give_one(seed, metric):
    case = clustered(seed, noise=1e-3)
    figures = evaluate_reid(**case, metric=metric, bootstrap=20, false_positive_rates=[0.0])
    assert [figures[name] for name in ("mAP", "mINP", "rank1")] == [1.0, 1.0, 1.0]
    assert figures["confidence_intervals"]["mAP"] == (1.0, 1.0)
    assert figures["true_positive_rates"].tolist() == [1.0]


def test_memory_maps_and_tensors_and_types_agree(tmp_path):
    case = clustered(1)
    expected = evaluate_reid(**case)["average_precision"]
    for convert in (torch.from_numpy, lambda x: x.astype(np.float64), np.asfortranarray, np.ndarray.tolist):
        changed = {name: convert(value) if "embeddings" in name else value for name, value in case.items()}
        np.testing.assert_array_equal(evaluate_reid(**changed)["average_precision"], expected)
    for name in ("query_embeddings", "gallery_embeddings"):
        np.save(tmp_path / f"{name}.npy", case[name])
        case[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    np.testing.assert_array_equal(evaluate_reid(**case)["average_precision"], expected)
    np.save(
        tmp_path / "distances.npy", pairwise_distances(case.pop("query_embeddings"), case.pop("gallery_embeddings"))
    )
    distances = np.load(tmp_path / "distances.npy", mmap_mode="r")
    np.testing.assert_array_equal(evaluate_reid(distances=distances, **case)["average_precision"], expected)


# With distances that are equal, and steps of the gallery that begin and end within it.
GPU_OPTIONS = [
    {"metric": "cosine"},
    {"metric": "euclidean", "ties": "pessimistic", "camera_pairs": True},
    {"ties": "index", "chunk_elements": 700, "false_positive_rates": [0.0, 1e-3, 0.1]},
    {"protocol": "any_camera", "ties": "pessimistic", "chunk_elements": 100},
]


def with_copies(case):
    """Every fifth gallery entry looks like the one before it, whoever that is."""
    gallery = case["gallery_embeddings"].copy()
    gallery[1::5] = gallery[: len(gallery) - 1 : 5]
    return {**case, "gallery_embeddings": gallery}


def same_figures(found, expected):
    for name in ("average_precision", "first_match_rank", "valid_queries", "true_positive_rates"):
        np.testing.assert_array_equal(found.get(name), expected.get(name))
    assert found.get("by_camera_pair") == expected.get("by_camera_pair")


@pytest.mark.gpu
@pytest.mark.parametrize("options", GPU_OPTIONS)
def test_cuda_tensors_agree(options):
    case = with_copies(clustered(1))
    on_gpu = {name: torch.from_numpy(value).cuda() for name, value in case.items()}
    same_figures(evaluate_reid(**on_gpu, **options), evaluate_reid(**case, **options))


class OnGpu(torch.Tensor):
    """A tensor in main memory that says it were on a GPU, and can't be read by numpy without `.cpu()`."""

    is_cuda = True
    device = torch.device("cuda:0")

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy


@pytest.mark.parametrize("options", GPU_OPTIONS)
@pytest.mark.parametrize("sides", [("query", "gallery"), ("query",), ("gallery",)])
def test_the_way_of_tensors_on_a_gpu_and_of_sides_on_different_devices(options, sides):
    case = with_copies(clustered(1))
    expected = evaluate_reid(**case, **options)
    for side in sides:
        case[f"{side}_embeddings"] = torch.from_numpy(case[f"{side}_embeddings"]).as_subclass(OnGpu)
    for kind in ("person", "camera"):
        case[f"query_{kind}_ids"] = torch.from_numpy(case[f"query_{kind}_ids"]).as_subclass(OnGpu)
    same_figures(evaluate_reid(**case, **options), expected)


def test_ids_as_strings():
    case = clustered(2)
    expected = evaluate_reid(**case)
    texts = {-1: "-1", 0: "0000"}
    named = dict(case)
    for side in ("query", "gallery"):
        named[f"{side}_person_ids"] = [texts.get(i, f"person {i}") for i in case[f"{side}_person_ids"].tolist()]
        named[f"{side}_camera_ids"] = [f"c{i}" for i in case[f"{side}_camera_ids"]]
    figures = evaluate_reid(**named, camera_pairs=True)
    np.testing.assert_array_equal(figures["average_precision"], expected["average_precision"])
    assert figures["by_camera_pair"][0]["query_camera"] == "c0"
    assert evaluate_reid(  # compared as written: "07" is nobody else than "07"
        distances=[[1.0, 0.0]], query_person_ids=["07"], gallery_person_ids=["07", "7"], protocol="any_camera"
    )["mAP"] == pytest.approx(0.5)


def test_any_camera_keeps_the_own_camera_and_reports_duplicates(caplog):
    case = {**GOOD, "gallery_camera_ids": [0, 0, 0], "gallery_embeddings": np.array([[1.0, 0], [0.1, 1], [1, 1]])}
    with pytest.raises(ValueError, match="None of the 2 queries"):
        evaluate_reid(**case)
    figures = evaluate_reid(**case, protocol="any_camera")
    assert figures["rank1"] == 1.0
    assert "1 queries have a true match with the very same embedding" in caplog.text
    del case["query_camera_ids"], case["gallery_camera_ids"]
    assert evaluate_reid(**case, protocol="any_camera")["mAP"] == figures["mAP"]


def test_zero_embeddings_are_at_one_from_everything():
    figures = evaluate_reid(
        np.zeros((1, 2)),
        np.array([[1.0, 0], [0, 1], [0, 0]]),
        gallery_person_ids=[2, 1, 2],
        gallery_camera_ids=[1] * 3,
        **IDS,
    )
    assert figures["mAP"] == pytest.approx(1 / 2)  # all three are tied, the match is the second


def test_one_identity():
    figures = evaluate_reid(
        np.eye(2), np.eye(2), query_person_ids=[1, 1], gallery_person_ids=[1, 1], protocol="any_camera"
    )
    assert figures["mAP"] == 1.0


@pytest.mark.parametrize("given", [True, False])
def test_false_positive_rates(given):
    case = clustered(3)
    distances = pairwise_distances(case["query_embeddings"], case["gallery_embeddings"])
    right = case["query_person_ids"][:, None] == case["gallery_person_ids"]
    same_camera = case["query_camera_ids"][:, None] == case["gallery_camera_ids"]
    matches = np.sort(distances[right & ~same_camera])
    others = np.sort(distances[~right & (case["gallery_person_ids"] != -1)])
    rates = [0.0, 1e-3, 0.01, 0.1, 1.0]
    expected = [  # the threshold is just below the first wrong pair too many
        (matches < others[int(rate * others.size)]).mean() if rate < 1 else 1.0 for rate in rates
    ]
    if given:
        case = {name: value for name, value in case.items() if "embeddings" not in name} | {"distances": distances}
    found = evaluate_reid(**case, false_positive_rates=rates)["true_positive_rates"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.1 / matches.size)  # a pair within a step of the range


def test_false_positive_rates_where_all_distances_are_equal():
    case = {"query_person_ids": [1, 2], "gallery_person_ids": [1, 2, 3], "protocol": "any_camera"}
    found = evaluate_reid(distances=np.zeros((2, 3)), **case, false_positive_rates=[0.1, 1.0])
    np.testing.assert_array_equal(found["true_positive_rates"], [0, 1])


@pytest.mark.parametrize(
    ("distances", "rates"),
    [
        ([[1, np.inf, np.inf], [np.inf, 1, np.inf]], [1, 1]),
        ([[np.inf, 1, 1], [1, np.inf, 1]], [0, 1]),
        ([[-np.inf, np.inf, np.inf], [np.inf, -np.inf, np.inf]], [1, 1]),
        (np.full((2, 3), np.inf), [0, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_false_positive_rates_where_distances_are_infinite_or_equal(distances, rates, dtype):
    case = {"query_person_ids": [1, 2], "gallery_person_ids": [1, 2, 3], "protocol": "any_camera"}
    found = evaluate_reid(distances=np.array(distances, dtype), **case, false_positive_rates=[0.0, 1.0])
    np.testing.assert_array_equal(found["true_positive_rates"], rates)


def test_bootstrap_draws_identities():
    case = clustered(4, queries=200, gallery=400, noise=2.0)
    figures = evaluate_reid(**case, bootstrap=2000)
    low, high = figures["confidence_intervals"]["mAP"]
    assert low < figures["mAP"] < high
    people = case["query_person_ids"][figures["valid_queries"]]
    sums = {person: figures["average_precision"][people == person] for person in np.unique(people)}
    rng = np.random.default_rng(9)
    means = [
        np.concatenate([sums[person] for person in rng.choice(list(sums), len(sums))]).mean() for _ in range(2000)
    ]
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.1 * (high - low))
    assert figures["confidence_intervals"] == evaluate_reid(**case, bootstrap=2000)["confidence_intervals"]
    narrow = evaluate_reid(**case, bootstrap=2000, confidence=0.5)["confidence_intervals"]["mAP"]
    assert low < narrow[0] < narrow[1] < high


def test_groups_of_queries():
    case = clustered(5)
    labels = np.where(np.arange(40) % 3 == 0, "occluded", "visible")
    figures = evaluate_reid(**case, query_groups={"occlusion": labels})
    valid = labels[figures["valid_queries"]]
    for row in figures["by_group"]["occlusion"]:
        members = valid == row["occlusion"]
        assert row["num_valid_queries"] == members.sum()
        assert row["mAP"] == pytest.approx(figures["average_precision"][members].mean())
        assert row["rank5"] == pytest.approx((figures["first_match_rank"][members] <= 5).mean())
    assert [row["occlusion"] for row in figures["by_group"]["occlusion"]] == ["occluded", "visible"]


@pytest.mark.parametrize("protocol", ["cross_camera", "any_camera"])
def test_camera_pairs_are_evaluations_of_their_own(protocol):
    case = clustered(6)
    rows = evaluate_reid(**case, protocol=protocol, camera_pairs=True)["by_camera_pair"]
    assert len(rows) == (6 if protocol == "cross_camera" else 9)
    for row in rows:
        part = {
            name: value[case[f"{side}_camera_ids"] == row[f"{side}_camera"]]
            for name, value in case.items()
            for side in [name.split("_")[0]]
        }
        alone = evaluate_reid(**part, protocol=protocol)
        assert row["num_valid_queries"] == alone["num_valid_queries"]
        assert [row[name] for name in ("mAP", "mINP", "rank1")] == [alone[name] for name in ("mAP", "mINP", "rank1")]


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
        ({"query_person_ids": [1.0, 2.0]}, "query_person_ids.*integers or strings.*float64"),
        ({"query_person_ids": None}, "query_person_ids.*missing"),
        ({"query_person_ids": ["a", "b"]}, "person_ids.*both.*got strings and integers"),
        ({"query_person_ids": ["a", "-2"], "gallery_person_ids": ["a", "b", "c"]}, "query_person_ids.*-1.*got -2"),
        ({"query_person_ids": np.array(["a", 1], object)}, "query_person_ids.*mixes"),
        ({"gallery_person_ids": [1, 2, -2]}, "gallery_person_ids.*at least -1.*got -2"),
        ({"query_person_ids": []}, "query_person_ids.*non-empty"),
        ({"query_camera_ids": [0]}, "query_camera_ids.*2 entries.*got 1"),
        ({"gallery_camera_ids": ["a", "b", "c"]}, "gallery_camera_ids.*integers and strings"),
        ({"query_camera_ids": None, "gallery_camera_ids": None}, "missing.*protocol=.any_camera"),
        ({"query_camera_ids": None}, "query_camera_ids.*missing"),
        ({"gallery_embeddings": np.empty((0, 2)), "gallery_person_ids": []}, "gallery_person_ids.*non-empty"),
        ({"protocol": "cuhk03"}, "protocol.*cuhk03"),
        ({"chunk_elements": 0}, "chunk_elements.*0"),
        ({"bootstrap": -1}, "bootstrap.*-1"),
        ({"bootstrap": 10, "query_person_ids": [1, 9]}, "bootstrap.*at least 2"),
        ({"bootstrap": 10, "confidence": 1.0}, "confidence.*1.0"),
        ({"false_positive_rates": [1.5]}, "false_positive_rates.*1.5"),
        ({"query_groups": {"occlusion": [1]}}, "occlusion.*2 entries"),
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
