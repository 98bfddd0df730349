import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import datasets
import filelock
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torchvision.models import get_model

from personvit_hf import load_person_images
from personvit_hf import video as video_module
from personvit_hf.detection import PersonDetector
from personvit_hf.person_images import PersonImages, decode_image
from personvit_hf.search import load_gallery_images
from personvit_hf.shards import load_person_stream
from personvit_hf.tracks import CropRules
from personvit_hf.video import VideoFrames, blur_head, crops_from_videos, cut_out

PERSONVIT = Path(sys.executable).with_name("personvit")
NUM_FRAMES = 40
RULES = CropRules(min_height=40, min_track_boxes=3, every=4, min_sharpness=10)


@pytest.fixture(autouse=True)
def short_chunks(own_cache, monkeypatch):
    monkeypatch.setattr(video_module, "CHUNK_FRAMES", 15)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A video of two textured people who walk, and their boxes: file, JSON of boxes."""
    folder = tmp_path_factory.mktemp("people")
    return write_video(folder / "two people.avi"), write_boxes(folder / "two people.json")


def write_video(path, num_frames=NUM_FRAMES, fourcc="MJPG"):
    rng = np.random.default_rng(0)
    textures = [np.repeat(rng.integers(0, 256, (12, 5, 1), dtype=np.uint8), 3, axis=2) for _ in range(2)]  # grey: JPEG
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), 10, (240, 160))
    for number in range(1, num_frames + 1):
        frame = np.full((160, 240, 3), 128, np.uint8)
        for texture, (left, top, width, height) in zip(textures, places(number), strict=True):
            picture = cv2.resize(texture, (width, height), interpolation=cv2.INTER_NEAREST)
            frame[top : top + height, left : left + width] = picture
        writer.write(frame)
    writer.release()
    return path


def places(number):
    return (10 + 3 * number, 20, 25, 60), (200 - 3 * number, 90, 25, 60)


def write_boxes(path, num_frames=NUM_FRAMES):
    boxes = [{"frame": n, "box": list(box), "score": 0.9} for n in range(1, num_frames + 1) for box in places(n)]
    path.write_text(json.dumps(boxes))
    return path


def test_crops_of_tracked_people(people, tmp_path):
    report = crops_from_videos([people[0]], tmp_path / "out", [people[1]], rules=RULES)
    assert (report.videos, report.frames, report.tracks, report.kept) == (1, NUM_FRAMES, 2, 20)
    assert report.skipped == {"soon after another of its track": 60}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["kept"] == 20
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert set(rows["track_id"]) == {0, 1} and set(rows["camera_id"]) == {0}
    frames = VideoFrames(people[0])
    whole = dict(frames.read(lambda number: True, 1, NUM_FRAMES + 1))
    assert frames.count == len(whole) == NUM_FRAMES
    for row in rows:
        left, top, width, height = places(row["frame"])[row["track_id"]]
        crop = np.asarray(row["image"]).astype(int)
        expected = whole[row["frame"]][top : top + height, left : left + width]
        assert crop.shape == expected.shape and np.abs(crop - expected).mean() < 6
    assert load_gallery_images(str(tmp_path / "out"), None).column_names == ["image", "camera_id", "track_id"]
    assert len(load_person_images(tmp_path / "out")) == len(load_person_stream(tmp_path / "out")) == 20


def test_mot_ids_and_two_videos(people, tmp_path):
    lines = [
        f"{n},{50 + i},{left},{top},{w},{h},1" for n in range(1, 41) for i, (left, top, w, h) in enumerate(places(n))
    ]
    (tmp_path / "gt.txt").write_text("\n".join(lines))
    report = crops_from_videos([people[0]] * 2, tmp_path / "out", [tmp_path / "gt.txt", people[1]], rules=RULES)
    assert (report.videos, report.tracks, report.kept) == (2, 4, 40)
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert sorted(set(zip(rows["camera_id"], rows["track_id"], strict=True))) == [
        (0, 0), (0, 1), (1, 1_000_000), (1, 1_000_001)
    ]  # fmt: skip


def test_chunks_are_read_in_one_go(people, tmp_path, monkeypatch):
    grabbed, real = [], cv2.VideoCapture

    class Capture:
        def __init__(self, *arguments):
            self.capture = real(*arguments)
            self.read, self.retrieve, self.release = self.capture.read, self.capture.retrieve, self.capture.release
            self.decodes = True

        def set(self, name, value):
            self.decodes = (name, value) != (cv2.CAP_PROP_FORMAT, -1)
            return self.capture.set(name, value)

        def grab(self):
            if self.decodes:
                grabbed.append(1)
            return self.capture.grab()

    frames = VideoFrames(people[0])
    whole = dict(frames.read(lambda number: True, 1, NUM_FRAMES + 1))
    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    for start, stop, grabs in ((10, 20, 19), (20, 30, 10), (35, 38, 8), (37, 38, 37), (3, 4, 3), (4, 41, 37)):
        found = dict(frames.read(lambda number: True, start, stop))
        assert list(found) == list(range(start, stop))
        assert all(np.array_equal(found[number], whole[number]) for number in found)
        assert len(grabbed) == grabs
        grabbed.clear()
    assert max(number for number, _ in frames.read(lambda number: True, 30, 99)) == NUM_FRAMES
    pairs = zip(*(frames.read(lambda number: True, start, 9) for start in (1, 5)), strict=False)  # in turns
    assert all(np.array_equal(frame, whole[number]) for pair in pairs for number, frame in pair)
    grabbed.clear()
    boxes = [entry for entry in json.loads(people[1].read_text()) if entry["frame"] <= 20]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    rules = CropRules(min_height=40, min_track_boxes=3, every=1, min_sharpness=10)
    assert crops_from_videos([people[0]], tmp_path / "out", [tmp_path / "boxes.json"], rules=rules).kept == 40
    assert len(grabbed) == 20  # up to the last wanted: packets are counted, not frames


def test_heads_are_blurred(people, tmp_path):
    for name, blurred in (("sharp", False), ("blurred", True)):
        crops_from_videos([people[0]], tmp_path / name, [people[1]], rules=RULES, blur_heads=blurred)
    pairs = [PersonImages(load_person_images(tmp_path / name)) for name in ("sharp", "blurred")]
    for index in range(len(pairs[0])):
        sharp, blurred = (images[index].astype(int) for images in pairs)
        difference = np.abs(sharp - blurred).mean(axis=(1, 2))
        assert difference[:17].mean() > 15 and difference[25:].mean() < 2
    assert "upper 30% of each crop is blurred" in (tmp_path / "blurred" / "README.md").read_text()
    head = blur_head(np.random.default_rng(0).integers(0, 256, (100, 40, 3), dtype=np.uint8))[:30]
    assert head.std() < 40  # of 74
    assert blur_head(np.zeros((1, 1, 3), np.uint8)).shape == (1, 1, 3)


def test_every_box_is_accounted_for(people, tmp_path):
    boxes = json.loads(people[1].read_text())
    boxes += [
        {"frame": 999, "box": [0, 0, 25, 60]},
        {"frame": 3, "box": [0, 0, 2, 5]},
        {"frame": 3, "box": [230, 10, 25, 60]},
    ]
    boxes += [{"frame": n, "box": [100, 2, 25, 60], "score": 0.95} for n in range(1, 6)]  # grey wall
    boxes += [{"frame": 7, "box": [10, 10, 25, 60], "score": 0.1}]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    rules = CropRules(min_score=0.5, min_height=40, min_track_boxes=3, every=4, min_sharpness=10, max_occlusion=1.0)
    report = crops_from_videos([people[0]], tmp_path / "out", [tmp_path / "boxes.json"], rules=rules)
    skipped = dict(report.skipped)
    assert report.kept + sum(skipped.values()) == len(boxes)
    assert skipped["frame not in the video"] == skipped["small"] == skipped["cut by the frame"] == 1
    assert skipped["low score"] == 1 and skipped["blurred"] >= 1


def test_killed_run_goes_on(people, tmp_path):
    out = tmp_path / "out"
    code = (
        "import time, sys, personvit_hf.video as v\n"
        "v.CHUNK_FRAMES = 15\n"
        "encode = v.encode\n"
        "v.encode = lambda crop: (time.sleep(0.1), encode(crop))[1]\n"
        "rules = v.CropRules(min_height=40, min_track_boxes=3, every=4, min_sharpness=10)\n"
        f"v.crops_from_videos([{str(people[0])!r}], {str(out)!r}, [{str(people[1])!r}], rules=rules)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while not list(out.glob("train-*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in out.glob("train-*.parquet")}
    assert 1 <= len(done) < 3
    report = crops_from_videos([people[0]], out, [people[1]], rules=RULES)
    assert (report.kept, report.tracks, report.new_chunks) == (20, 2, 3 - len(done))
    assert done.items() <= {file: file.stat().st_mtime_ns for file in out.glob("train-*.parquet")}.items()
    assert not list(out.glob(".train-*"))
    whole = crops_from_videos([people[0]], tmp_path / "whole", [people[1]], rules=RULES)
    assert whole.skipped == report.skipped
    assert load_person_images(out)["image"] == load_person_images(tmp_path / "whole")["image"]


def test_chunks_without_a_crop(people, tmp_path):
    boxes = [entry for entry in json.loads(people[1].read_text()) if 18 <= entry["frame"] <= 28]  # of chunks of 15
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    out, arguments = tmp_path / "out", ([people[0]], tmp_path / "out", [tmp_path / "boxes.json"])
    report = crops_from_videos(*arguments, rules=RULES)
    assert report.kept == 6 and report.new_chunks == 3
    assert [pq.read_metadata(file).num_row_groups for file in sorted(out.glob("train-*.parquet"))] == [0, 1, 0]
    assert len(load_person_images(out)["image"]) == len(datasets.load_dataset(str(out), split="train")) == 6
    stream = load_person_stream(out)
    assert len([row for piece in stream.pieces for row in stream.read(piece, 0, piece.num_rows)]) == 6
    assert crops_from_videos(*arguments, rules=RULES).new_chunks == 0


def test_other_settings_and_two_processes(people, tmp_path):
    out = tmp_path / "out"
    crops_from_videos([people[0]], out, [people[1]], rules=RULES)
    with pytest.raises(ValueError, match="holds crops of other videos or settings"):
        crops_from_videos([people[0]], out, [people[1]], rules=RULES, blur_heads=True)
    with filelock.FileLock(out / ".from-video.lock"), pytest.raises(ValueError, match="another process"):
        crops_from_videos([people[0]], out, [people[1]], rules=RULES)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="parquet files of another source"):
        crops_from_videos([people[0]], tmp_path / "other", [people[1]], rules=RULES)


def test_a_start_that_made_nothing_locks_no_folder(people, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match="or give boxes"):
        crops_from_videos([people[0]], tmp_path / "out", rules=RULES)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no crop can be kept"):
        crops_from_videos([people[0]], tmp_path / "out", [people[1]], rules=CropRules(min_height=1000))
    assert crops_from_videos([people[0]], tmp_path / "out", [people[1]], rules=RULES).kept > 0
    with pytest.raises(ValueError, match="holds crops of other videos or settings"):
        crops_from_videos([people[0]], tmp_path / "out", [people[1]], rules=CropRules(min_height=1000))


def test_detections_are_of_one_detector(people, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("from-video.json", "detections-0000-00000.json"):
        (tmp_path / "out" / name).write_text("[]")
    with pytest.raises(ValueError, match="holds crops of other videos or settings"):
        crops_from_videos([people[0]], tmp_path / "out", [people[1]], rules=RULES)


def test_bad_videos(people, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such video"):
        crops_from_videos([tmp_path / "a.mp4"], tmp_path / "out", [people[1]])
    for name, content in (("empty.mp4", b""), ("text.mp4", b"hello"), ("cut.avi", people[0].read_bytes()[:200])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: no video that can be read"):
            crops_from_videos([tmp_path / name], tmp_path / "out", [people[1]])
    with pytest.raises(ValueError, match="2 videos and 1 files of boxes"):
        crops_from_videos([people[0]] * 2, tmp_path / "out", [people[1]])
    with pytest.raises(ValueError, match="0 videos"):
        crops_from_videos([], tmp_path / "out")
    with pytest.raises(ValueError, match="`stride`"):
        crops_from_videos([people[0]], tmp_path / "out", stride=0)
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match="no crop can be kept"):
        crops_from_videos([people[0]], tmp_path / "none", [tmp_path / "none.json"])


def test_video_cut_off_in_the_middle(people, tmp_path):
    content = people[0].read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    report = crops_from_videos([tmp_path / "cut.avi"], tmp_path / "out", [people[1]], rules=RULES)
    assert 5 < report.kept < 15 and report.skipped["frame not in the video"] > 20
    assert report.kept + sum(report.skipped.values()) == 2 * NUM_FRAMES


@pytest.mark.parametrize("kind", ["MJPG.avi", "mp4v.mp4", "mp4v.mkv", "VP80.webm"])
def test_packets_tell_the_frames_of_a_whole_video(tmp_path, kind):
    frames = VideoFrames(write_video(tmp_path / kind, fourcc=kind[:4]))
    assert [frames.count_with(last) for last in (0, NUM_FRAMES, 999)] == [NUM_FRAMES] * 3 == [frames.count] * 3


def test_boxes_behind_a_damage_that_ends_the_video(people, tmp_path):
    pictures = people[0].read_bytes().split(b"\xff\xd8\xff")
    damaged, num_frames = tmp_path / "damaged.avi", 20
    whole, broken = pictures[: num_frames + 1], pictures[num_frames + 1 :]
    damaged.write_bytes(bytes(603).join([b"\xff\xd8\xff".join(whole), *(picture[600:] for picture in broken)]))
    assert (VideoFrames(damaged).count, VideoFrames(damaged).count_with(30)) == (num_frames, NUM_FRAMES)
    boxes = [entry for entry in json.loads(people[1].read_text()) if entry["frame"] <= 30]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    rules = CropRules(min_height=40, min_track_boxes=3, every=1, min_sharpness=0)
    for _ in range(2):
        report = crops_from_videos([damaged], tmp_path / "out", [tmp_path / "boxes.json"], rules=rules)
        assert report.kept == 2 * num_frames
        assert report.skipped == {"frame not in the video": 2 * (30 - num_frames)}


def test_boxes_from_a_file_need_no_torch(people, tmp_path):
    code = (
        "import sys\n"
        "from personvit_hf import video\n"
        "rules = video.CropRules(min_height=40, min_track_boxes=3, every=4, min_sharpness=10)\n"
        "video.crops_from_videos([sys.argv[1]], sys.argv[3], [sys.argv[2]], rules=rules)\n"
        "assert not {'torch', 'torchvision'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *people, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("box", [(-5, -5, 20, 20), (230, 150, 50, 50), (500, 500, 5, 5), (-50, -50, 5, 5)])
def test_boxes_beyond_the_frame(box):
    crop = cut_out(np.zeros((160, 240, 3), np.uint8), np.array(box, np.float32))
    assert min(crop.shape) >= 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None)
    with torch.no_grad():
        for layer in model.head.classification_head.module_list:
            layer[1].bias.view(-1, 91)[:, 1] = 5.0  # sees people everywhere
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(model.state_dict(), path)
    return path


def test_detector_by_a_file_of_weights_goes_on_after_its_last_chunk(people, weights, tmp_path):
    """What random weights find means nothing: what counts is the way from detector to crops."""
    rules = CropRules(min_score=0.0, min_height=1, aspects=(0.01, 100), min_inside=0, max_occlusion=1, min_sharpness=0,
                      min_track_boxes=1, every=1)  # fmt: skip
    out = tmp_path / "out"
    options = {"detector": "ssdlite320_mobilenet_v3_large", "detector_weights": weights, "stride": 10, "rules": rules}
    report = crops_from_videos([people[0]], out, **options)
    assert report.frames == 4 and report.kept > 0
    detections = [entry for file in sorted(out.glob("detections-*.json")) for entry in json.loads(file.read_text())]
    assert {entry["frame"] for entry in detections} <= {1, 11, 21, 31}
    assert report.kept + sum(report.skipped.values()) == len(detections)
    for file in out.glob("train-*.parquet"):
        file.unlink()
    PersonDetector.__call__, call = None, PersonDetector.__call__
    try:
        assert crops_from_videos([people[0]], out, **options).kept == report.kept  # detected no second time
    finally:
        PersonDetector.__call__ = call


def test_detections_are_boxes_of_people(weights):
    detector = PersonDetector("ssdlite320_mobilenet_v3_large", weights, "cpu")
    detector.model = lambda images: [
        {
            "boxes": torch.tensor([[10.0, 20, 40, 90], [1, 2, 3, 4], [5, 5, 5, 9]]),
            "labels": torch.tensor([1, 3, 1]),
            "scores": torch.tensor([0.9, 0.8, 0.7]),
        }
        for _ in images
    ]
    ((boxes, scores),) = detector([np.zeros((100, 100, 3), np.uint8)])
    assert boxes.tolist() == [[10, 20, 30, 70]] and scores.tolist() == pytest.approx([0.9])


def test_bad_detectors(weights, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such detector; it has.*fasterrcnn"):
        PersonDetector("yolo")
    with pytest.raises(FileNotFoundError, match="a.pth: no such checkpoint file"):
        PersonDetector("ssdlite320_mobilenet_v3_large", tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no weights of retinanet"):
        PersonDetector("retinanet_resnet50_fpn", weights)
    (tmp_path / "a.pth").write_bytes(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match="a.pth: not a checkpoint that can be read safely"):
        PersonDetector("ssdlite320_mobilenet_v3_large", tmp_path / "a.pth")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match="can't be fetched.*give its path, or give boxes"):
        PersonDetector("ssdlite320_mobilenet_v3_large")


def offline(*arguments, **options):
    raise OSError("no network")


def test_the_command(people, tmp_path):
    command = [PERSONVIT, "data", "from-video", people[0], "--boxes", people[1], "--out", tmp_path / "out"]
    command += ["--min-height", "40", "--every", "4", "--min-sharpness", "10", "--blur-heads"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "1 videos, 40 frames, 80 boxes: kept 20 crops of 2 tracks, skipped 60" in process.stdout
    assert decode_image(load_person_images(tmp_path / "out")[0]["image"]).shape == (60, 25, 3)
