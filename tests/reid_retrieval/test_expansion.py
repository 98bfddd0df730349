import numpy as np
import pytest
import torch

from personvit_hf.reid_retrieval.expansion import expand_queries, remove_camera_bias
from personvit_hf.reid_retrieval.ranking import evaluate_reid


def people_in_cameras(seed=0, bias=1.0):
    """Embeddings of 30 people in 4 cameras, each camera with a direction of its own added."""
    rng = np.random.default_rng(seed)
    people, cameras = rng.normal(size=(31, 32)), bias * 3 * rng.normal(size=(4, 32))
    case = {}
    for name, size in (("query", 60), ("gallery", 600)):
        ids, where = rng.integers(1, 31, size), rng.integers(0, 4, size)
        embeddings = people[ids] + cameras[where] + 0.8 * rng.normal(size=(size, 32))
        case |= {f"{name}_person_ids": ids, f"{name}_camera_ids": where, f"{name}_embeddings": embeddings}
    return case


def test_expansion_by_hand():
    query, gallery = np.array([[2.0, 0.0]]), np.array([[0.6, 0.8], [0.0, 1.0], [1.6, -1.2]])
    # nearest are the third (0.8, -0.6) and the first (0.6, 0.8)
    mean = np.array([1 + 0.8 + 0.6, -0.6 + 0.8])
    np.testing.assert_allclose(expand_queries(query, gallery, k=2)[0], mean / np.linalg.norm(mean), atol=1e-6)
    weighted = np.array([1 + 0.8**3 * 0.8 + 0.6**3 * 0.6, 0.8**3 * -0.6 + 0.6**3 * 0.8])
    expected = weighted / np.linalg.norm(weighted)
    np.testing.assert_allclose(expand_queries(query, gallery, k=2, alpha=3)[0], expected, atol=1e-6)
    np.testing.assert_array_equal(
        expand_queries(torch.from_numpy(query), torch.from_numpy(gallery)[:2], k=1),
        expand_queries(query, gallery[:2], k=1),
    )


@pytest.mark.parametrize("alpha", [0, 3])
def test_expansion_raises_the_score(alpha):
    case = people_in_cameras(bias=0)
    before = evaluate_reid(**case)["mAP"]
    case["query_embeddings"] = expand_queries(case["query_embeddings"], case["gallery_embeddings"], alpha=alpha)
    assert evaluate_reid(**case)["mAP"] > before + 0.02


def test_without_camera_bias_people_are_found_across_cameras():
    case = people_in_cameras()
    before = evaluate_reid(**case)["mAP"]
    embeddings = np.concatenate([case["query_embeddings"], case["gallery_embeddings"]])
    cameras = np.concatenate([case["query_camera_ids"], case["gallery_camera_ids"]])
    kept = embeddings.copy()
    changed = remove_camera_bias(embeddings, cameras)
    np.testing.assert_array_equal(embeddings, kept)
    np.testing.assert_allclose(np.linalg.norm(changed, axis=1), 1, atol=1e-6)
    case["query_embeddings"], case["gallery_embeddings"] = changed[:60], changed[60:]
    assert evaluate_reid(**case)["mAP"] > before + 0.1
    names = [f"camera {camera}" for camera in cameras]
    np.testing.assert_array_equal(remove_camera_bias(embeddings, names), changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expand_queries(np.eye(2), np.eye(3)), "equal width"),
        (lambda: expand_queries(np.eye(3), np.eye(3), k=4), "k.*from 1 to the 3"),
        (lambda: expand_queries(np.eye(3), np.eye(3), k=1, alpha=-1), "alpha.*-1"),
        (lambda: expand_queries(np.full((3, 3), np.nan), np.eye(3), k=1), "query.*NaN"),
        (lambda: remove_camera_bias(np.eye(3), [1, 2]), "camera_ids.*3 entries.*2"),
        (lambda: remove_camera_bias(np.full((3, 3), np.inf), [1, 2, 1]), "embeddings.*infinity"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
