import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personvit_hf import tracks
from personvit_hf.tracks import (
    Boxes,
    CropRules,
    link_boxes,
    occlusions,
    overlaps,
    read_boxes,
    reasons_against,
    sharpness,
)


def boxes_of(*rows):
    """Boxes of (frame, left, top, width, height)."""
    return Boxes.from_rows([(row[0], row[1:], 1.0, -1) for row in rows])


def test_mot_files(tmp_path):
    file = tmp_path / "gt.txt"
    file.write_text("2,7,10,20,30,60,1,-1,-1,-1\n\n1,7,9.5,20,30,60,0.5,-1,-1,-1\n")
    boxes = read_boxes(file)
    assert boxes.frames.tolist() == [1, 2] and boxes.track_ids.tolist() == [7, 7]
    np.testing.assert_allclose(boxes.boxes, [[9.5, 20, 30, 60], [10, 20, 30, 60]])
    np.testing.assert_allclose(boxes.scores, [0.5, 1])
    # nine columns: ground truth with a flag and a class
    file.write_text("1,1,10,20,30,60,1,1,0.9\n1,2,10,20,30,60,0,1,0.9\n1,3,10,20,30,60,1,7,0.9\n")
    assert read_boxes(file).track_ids.tolist() == [1]
    file.write_text("1,-1,10,20,30,60\n")
    assert len(read_boxes(file)) == 1
    file.write_text("")
    assert len(read_boxes(file)) == 0


def test_json_of_detectors(tmp_path):
    file = tmp_path / "boxes.json"
    file.write_text(
        json.dumps(
            [
                {"frame": 3, "box": [1, 2, 3, 4], "score": 0.25, "track_id": 5},
                {"image_id": 2, "category_id": 1, "bbox": [1, 2, 3, 4]},
                {"image_id": 2, "category_id": 3, "bbox": [1, 2, 3, 4]},
            ]
        )
    )
    boxes = read_boxes(file)
    assert boxes.frames.tolist() == [2, 3] and boxes.track_ids.tolist() == [-1, 5]
    assert boxes.scores.tolist() == [1, 0.25]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"1,2,3\n", "line 1: expected frame,id"),
        ("a.txt", b"1,1,0,0,5,9\nx,1,0,0,5,9\n", "line 2: expected frame,id"),
        ("a.txt", b"1.5,1,0,0,5,9\n", "line 1: expected frame,id"),
        ("a.txt", b"1,1,0,0,nan,9\n", "line 1: expected a frame from 1 and a box"),
        ("a.txt", b"1,1,0,0,0,9\n", "line 1: expected a frame from 1 and a box"),
        ("a.txt", b"0,1,0,0,5,9\n", "line 1: expected a frame from 1 and a box"),
        ("a.txt", b"1e99,1,0,0,5,9\n", "line 1: expected a frame from 1 and a box"),
        ("a.txt", b"inf,1,0,0,5,9\n", "line 1: expected frame,id"),
        ("a.txt", b"1,1e19,0,0,5,9\n", "line 1: expected a track id of at most 64 bits"),
        ("a.txt", b"1,1,0,0,5,9\n \n", "line 2: expected frame,id"),
        ("a.txt", b"\xff\xfe\x00", "no text"),
        ("a.json", b"{", "no JSON"),
        ("a.json", b"[" * 100_000, "no JSON"),
        ("a.json", b"{}", "expected a list of boxes, found dict"),
        ("a.json", b"[1]", "entry 0: expected"),
        ("a.json", b"[{}]", "entry 0: expected"),
        ("a.json", b'[{"frame": 1, "box": [1, 2, 3]}]', "entry 0: expected"),
        ("a.json", b'[{"frame": 1, "box": "abcd"}]', "entry 0: expected"),
        ("a.json", b'[{"frame": null, "box": [1, 2, 3, 4]}]', "entry 0: expected"),
        ("a.json", b'[{"frame": 1, "box": [1, 2, -3, 4]}]', "entry 0: expected a frame from 1 and a box"),
        ("a.json", b'[{"frame": 1, "box": [1, 2, 3, 4], "score": NaN}]', "entry 0: expected a frame from 1"),
    ],
)
def test_bad_boxes(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read_boxes(tmp_path / name)


@pytest.mark.parametrize("columns", [6, 7, 9, 10])
def test_files_without_fault_are_read_at_once(tmp_path, monkeypatch, columns):
    rng = np.random.default_rng(0)
    rows = np.round(rng.uniform(1, 50, (300, columns)), 3)
    rows[:, :2] = rng.integers(1, 40, (300, 2))
    if columns > 6:
        rows[:, 6:8] = rng.integers(0, 3, rows[:, 6:8].shape)
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(",".join(f"{value:g}" for value in row) for row in rows))
    line_by_line = tracks._mot_rows
    monkeypatch.setattr(tracks, "_mot_rows", None)
    boxes = read_boxes(file)
    monkeypatch.setattr(tracks, "_mot_rows", line_by_line)
    monkeypatch.setattr(tracks, "_mot_boxes", lambda text: None)
    expected = read_boxes(file)
    assert 20 < len(boxes) == len(expected)
    for name, values in vars(boxes).items():
        found = getattr(expected, name)
        assert values.dtype == found.dtype
        np.testing.assert_array_equal(values, found)


def test_no_boxes_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of boxes"):
        read_boxes(tmp_path / "a.txt")


def test_overlaps():
    intersection, shares = overlaps(np.array([[0, 0, 10, 10]], np.float32), np.array([[5, 0, 10, 10], [20, 0, 1, 1]]))
    np.testing.assert_allclose(intersection, [[50, 0]])
    np.testing.assert_allclose(shares, [[1 / 3, 0]])


def test_two_people_who_pass_keep_their_tracks():
    rows = [(frame, 4 * frame, 0, 20, 50) for frame in range(1, 30)]
    rows += [(frame, 200 - 4 * frame, 60, 20, 50) for frame in range(1, 30)]
    boxes = boxes_of(*rows)
    tracks = link_boxes(boxes)
    assert len(set(tracks)) == 2
    for top in (0, 60):
        assert len(set(tracks[boxes.boxes[:, 1] == top])) == 1


def test_a_track_survives_a_gap_and_ends_after_a_long_one():
    boxes = boxes_of((1, 0, 0, 20, 50), (6, 2, 0, 20, 50), (12, 2, 0, 20, 50))
    assert link_boxes(boxes).tolist() == [0, 0, 1]


def test_ids_that_came_with_the_boxes_are_kept():
    boxes = Boxes.from_rows([(1, (0, 0, 9, 9), 1.0, 70), (2, (500, 0, 9, 9), 1.0, 70), (2, (0, 0, 9, 9), 1.0, 7)])
    assert link_boxes(boxes).tolist() == [1, 1, 0]


@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(0, 50), st.integers(0, 50), st.integers(1, 40), st.integers(1, 40)),
        max_size=25,
    )
)
def test_every_box_has_one_track_and_no_track_two_boxes_of_a_frame(rows):
    boxes = boxes_of(*rows)
    tracks = link_boxes(boxes)
    assert sorted(set(tracks.tolist())) == list(range(len(set(tracks.tolist()))))
    assert len(set(zip(boxes.frames.tolist(), tracks.tolist(), strict=True))) == len(boxes)
    hidden = occlusions(boxes)
    assert ((hidden >= 0) & (hidden <= 1 + 1e-6)).all()


def test_occlusion_is_by_those_in_front():
    boxes = boxes_of((1, 0, 0, 10, 40), (1, 5, 10, 10, 40), (2, 0, 0, 10, 40))
    np.testing.assert_allclose(occlusions(boxes), [0.5 * 30 / 40, 0, 0])


def test_reasons():
    rules = CropRules(min_height=50, min_track_boxes=2, every=2, max_occlusion=0.3)
    good = [(frame, 10, 10, 25, 60) for frame in (1, 2, 3)]
    bad = [(1, 100, 10, 10, 20), (1, 200, 10, 100, 60), (1, 380, 100, 40, 90), (1, 300, 10, 25, 60)]
    boxes = boxes_of(*good, *bad)
    reasons = reasons_against(boxes, link_boxes(boxes), (240, 400), rules)
    found = dict(zip([tuple(row) for row in boxes.boxes.tolist()], reasons, strict=True))
    assert found[(100, 10, 10, 20)] == "small"
    assert found[(200, 10, 100, 60)] == "not the shape of a person"
    assert found[(380, 100, 40, 90)] == "cut by the frame"
    assert found[(300, 10, 25, 60)] == "short track"
    of_good = [reason for frame, reason, box in zip(boxes.frames, reasons, boxes.boxes, strict=True) if box[0] == 10]
    assert of_good == [None, "soon after another of its track", None]
    boxes = boxes_of((1, 0, 0, 20, 60), (1, 5, 10, 20, 60), (2, 0, 0, 20, 60), (2, 5, 10, 20, 60))
    rules = CropRules(min_height=50, min_track_boxes=2, every=1)
    assert reasons_against(boxes, link_boxes(boxes), (240, 400), rules) == ["occluded", None] * 2
    assert reasons_against(boxes_of(), link_boxes(boxes_of()), (240, 400), rules) == []


def test_sharpness_tells_blur():
    sharp = np.random.default_rng(0).integers(0, 256, (128, 64, 3), dtype=np.uint8)
    assert sharpness(sharp) > 1000
    assert sharpness(np.full((200, 80, 3), 90, np.uint8)) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"min_inside": 1.5},
        {"max_occlusion": -0.1},
        {"min_height": 0},
        {"every": 0},
        {"min_track_boxes": 0},
        {"min_sharpness": float("nan")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_bad_rules(change):
    with pytest.raises(ValueError, match=f"`{next(iter(change))}` must be"):
        CropRules(**change)
