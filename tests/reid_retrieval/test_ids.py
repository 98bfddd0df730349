import numpy as np
import pytest

from personvit_hf import evaluate_reid

NAMES = ("query_person_ids", "gallery_person_ids", "query_camera_ids", "gallery_camera_ids")


@pytest.mark.parametrize("name", NAMES)
def test_ids_beyond_int64_are_not_wrapped_to_junk(name):
    ids = dict(zip(NAMES, ([1], [1], [0], [1]), strict=True))
    assert evaluate_reid(distances=[[0.5]], **{**ids, name: np.array(ids[name], np.uint64)})["mAP"] == 1
    with pytest.raises(ValueError, match=f"`{name}` must hold integers of 64 bits with a sign, got {2**64 - 1}"):
        evaluate_reid(distances=[[0.5]], **{**ids, name: np.array([2**64 - 1], np.uint64)})
