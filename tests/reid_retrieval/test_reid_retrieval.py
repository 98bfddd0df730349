from pathlib import Path

import evaluate
import numpy as np
import pytest

import personvit_hf.reid_retrieval
from personvit_hf.reid_retrieval.ranking import evaluate_reid

FOLDER = Path(personvit_hf.reid_retrieval.__file__).parent


@pytest.fixture
def metric(tmp_path):
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path))


def mixed_rows(seed=0, images=60):
    rng = np.random.default_rng(seed)
    return {
        "predictions": rng.normal(size=(images, 8)).astype(np.float32),
        "person_ids": rng.integers(-1, 6, images),
        "camera_ids": rng.integers(0, 3, images),
        "is_query": rng.random(images) < 0.3,
    }


@pytest.mark.parametrize("options", [{}, {"metric": "euclidean", "max_rank": 5, "ties": "pessimistic"}])
def test_loaded_metric_equals_the_function(metric, options):
    rows = mixed_rows()
    is_query = rows["is_query"]
    expected = evaluate_reid(
        rows["predictions"][is_query],
        rows["predictions"][~is_query],
        query_person_ids=rows["person_ids"][is_query],
        gallery_person_ids=rows["person_ids"][~is_query],
        query_camera_ids=rows["camera_ids"][is_query],
        gallery_camera_ids=rows["camera_ids"][~is_query],
        **options,
    )
    figures = metric.compute(**rows, **options)
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(figures[name], value, err_msg=name)


def test_batches_equal_one_call(metric):
    rows = mixed_rows(seed=1)
    whole = metric.compute(**rows)
    for part in np.array_split(np.arange(60), 4):
        metric.add_batch(**{name: column[part] for name, column in rows.items()})
    assert metric.compute() == whole


def test_no_query_is_an_error(metric):
    rows = mixed_rows()
    rows["is_query"][:] = False
    with pytest.raises(ValueError, match="is_query"):
        metric.compute(**rows)
