import numpy as np
import pytest

from personvit_hf import evaluate_reid

CASE = {
    "distances": [[0.1, 0.2], [0.2, 0.1]],
    **{"query_person_ids": [1, 2], "gallery_person_ids": [1, 2]},
    **{"query_camera_ids": [0, 0], "gallery_camera_ids": [1, 1]},
}


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        (["b", "a"], ["a", "b"]),
        (np.array(["b", "a"], object), ["a", "b"]),
        ((2.5, 1), [1.0, 2.5]),
        ([True, True], [True]),
    ],
)
def test_labels_of_groups(labels, rows):
    found = evaluate_reid(**CASE, query_groups={"g": labels})["by_group"]["g"]
    assert [(row["g"], type(row["g"])) for row in found] == [(label, type(label)) for label in rows]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["a", "b"]], "must be a dict of labels by name.*got a list"),
        ("occlusion", "must be a dict of labels by name.*got a str"),
        ({"g": ["a", None]}, "'g'.*None"),
        ({"g": [1, None]}, "'g'.*None"),
        ({"g": [1.0, float("nan")]}, "'g'.*NaN"),
        ({"g": ["a", float("nan")]}, "'g'.*NaN"),
        ({"g": ["a", 1]}, "'g'.*mixes"),
        ({"g": None}, "'g'.*2 entries"),
    ],
    ids=str,
)
def test_bad_groups(groups, message):
    with pytest.raises(ValueError, match=f"`query_groups.*{message}"):
        evaluate_reid(**CASE, query_groups=groups)
