from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from app_server import DATA
from PIL import Image

from personvit_hf import (
    PersonViTConfig,
    PersonViTForReID,
    PersonViTImageProcessor,
    PersonViTModel,
    embed_images,
    tracking,
)
from personvit_hf.person_images import PersonImages
from personvit_hf.reid_data import load_reid_dataset
from personvit_hf.tracking import BOXMOT_SIZE, TrackerEmbedder, export_boxmot

IMAGENET_MEAN, IMAGENET_STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def small(size=(64, 32), **settings) -> tuple[PersonViTForReID, PersonViTImageProcessor]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    config = PersonViTConfig(image_size=list(size), num_labels=3, initializer_range=0.2, **sizes, **settings)
    model = PersonViTForReID(config).eval()
    model.bottleneck.running_mean.normal_()  # as a trained one has
    processor = PersonViTImageProcessor(size=dict(zip(("height", "width"), size, strict=True)))
    processor.image_mean, processor.image_std = [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
    return model, processor


@pytest.fixture(scope="module")
def people() -> list[np.ndarray]:
    """BGR crops of the rendered people."""
    pictures = PersonImages(load_reid_dataset(DATA)["query"])
    return [np.ascontiguousarray(pictures[i][:, :, ::-1]) for i in range(0, 30, 5)]


def frame_of(crops) -> tuple[np.ndarray, np.ndarray]:
    """A frame in which the crops stand beside each other, and their boxes."""
    frame = np.full((300, sum(crop.shape[1] for crop in crops), 3), 128, np.uint8)
    boxes, left = [], 0
    for crop in crops:
        height, width = crop.shape[:2]
        frame[10 : 10 + height, left : left + width] = crop
        boxes.append([left, 10, left + width, 10 + height])
        left += width
    return frame, np.array(boxes)


def test_boxes_of_a_frame_give_the_features_of_the_crops(people):
    model, processor = small()
    embedder = TrackerEmbedder(model, processor, batch_size=4)
    frame, boxes = frame_of(people)
    wanted = embed_images(model, processor, [np.ascontiguousarray(crop[:, :, ::-1]) for crop in people])
    features = embedder.get_features(boxes, frame)
    assert features.dtype == np.float32 and features.shape == (6, 32)
    np.testing.assert_allclose(features, wanted, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    # with more columns, as detections have them, and with parts of pixels
    scored = np.hstack([boxes + 0.3, np.full((6, 1), 0.9)])
    np.testing.assert_allclose(embedder.get_features(scored, frame), wanted, atol=1e-5)
    np.testing.assert_allclose(embedder.predict(people), wanted, atol=1e-5)


def test_boxes_at_the_edge_are_cut_and_those_outside_are_black(people):
    embedder = TrackerEmbedder(*small())
    frame, _ = frame_of(people)
    height, width = frame.shape[:2]
    outside = [[width + 5, 0, width + 50, 90], [-30, 0, -5, 90], [30, 50, 30, 60]]  # and one of no size
    boxes = np.array([[-20, -20, 40, 90], [0, 0, 40, 90], *outside])
    features = embedder.get_features(boxes, frame)
    np.testing.assert_allclose(features[0], features[1], atol=1e-6)
    black = embedder.predict([np.zeros((64, 32, 3), np.uint8)])[0]
    np.testing.assert_allclose(features[2:], [black] * 3, atol=1e-5)


@pytest.mark.parametrize("height", [1, 3, 4])
def test_boxes_of_few_pixels_are_no_channels(people, height):
    model, processor = small()
    frame, _ = frame_of(people)
    low = np.array([[5, -20, 45, height]])
    wanted = embed_images(model, processor, [Image.fromarray(frame[:height, 5:45, ::-1].copy())])
    np.testing.assert_allclose(TrackerEmbedder(model, processor).get_features(low, frame), wanted, atol=1e-5)


def test_no_boxes_no_features():
    embedder = TrackerEmbedder(*small())
    frame = np.zeros((10, 10, 3), np.uint8)
    for boxes in (np.zeros((0, 4)), [], np.zeros((0, 6))):
        assert embedder.get_features(boxes, frame).shape == (0, 32)
    assert embedder.predict([]) == []
    for crop in (np.zeros((9, 5, 4), np.uint8), np.zeros((9, 5), np.uint8), np.zeros((9, 5, 3))):
        with pytest.raises(ValueError, match=r"`crops\[1\]` must be uint8 \(height, width, 3\) BGR, got"):
            embedder.predict([np.zeros((9, 5, 3), np.uint8), crop])


@pytest.mark.parametrize(
    "boxes, frame, message",
    [
        ([[0, 0, 5, 5]], np.zeros((10, 10, 3), np.float32), "float32"),
        ([[0, 0, 5, 5]], np.zeros((10, 10), np.uint8), r"\(10, 10\)"),
        ([[0, 0, 5, 5]], None, "NoneType"),
        ([[0, 0, 5]], np.zeros((10, 10, 3), np.uint8), r"got \(1, 3\)"),
        ([0, 0, 5, 5], np.zeros((10, 10, 3), np.uint8), r"got \(4,\)"),
        ([[0, 0, np.nan, 5]], np.zeros((10, 10, 3), np.uint8), "finite"),
        # left, top, width, height
        ([[0, 0, 3, 5], [6, 2, 3, 5]], np.zeros((10, 10, 3), np.uint8), r"left, top, right, bottom.*\[6.*box 1"),
        ([[0, 5, 3, 2]], np.zeros((10, 10, 3), np.uint8), "left, top, right, bottom.*box 0"),
    ],
)
def test_wrong_frames_and_boxes(boxes, frame, message):
    with pytest.raises(ValueError, match=message):
        TrackerEmbedder(*small()).get_features(boxes, frame)


def test_a_model_is_put_where_accelerate_computes_or_where_one_says(tmp_path, monkeypatch):
    for part in small():
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(tracking, "PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    assert TrackerEmbedder.from_pretrained(str(tmp_path)).model.device.type == "meta"
    assert TrackerEmbedder.from_pretrained(str(tmp_path), device="cpu").model.device.type == "cpu"


def test_the_feature_after_the_neck_may_be_asked_for(people, tmp_path):
    model, processor = small()
    model.save_pretrained(tmp_path / "reid")
    processor.save_pretrained(tmp_path / "reid")
    before, after = (
        TrackerEmbedder.from_pretrained(str(tmp_path / "reid"), neck).predict(people) for neck in (None, "after")
    )
    model.config.neck_feature = "after"
    np.testing.assert_allclose(after, TrackerEmbedder(model, processor).predict(people), atol=1e-5)
    assert not np.allclose(before, after, atol=1e-2)
    PersonViTModel(model.config).save_pretrained(tmp_path / "backbone")
    processor.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match="for a PersonViTModel"):
        TrackerEmbedder.from_pretrained(str(tmp_path / "backbone"), "after")
    with pytest.raises(ValueError, match="'beside'"):
        TrackerEmbedder.from_pretrained(str(tmp_path / "reid"), "beside")


def as_boxmot(session, boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """What BoxMOT's ONNX backend does with a frame, written down from its source."""
    crops = []
    for left, top, right, bottom in boxes:
        crop = cv2.resize(frame[top:bottom, left:right], BOXMOT_SIZE[::-1], interpolation=cv2.INTER_LINEAR)
        crops.append((cv2.cvtColor(crop, cv2.COLOR_BGR2RGB).astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD)
    batch = np.stack(crops).transpose(0, 3, 1, 2).astype(np.float32)
    features = session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: batch})[0]
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


@pytest.mark.slow  # PyTorch's exporter takes seconds
@pytest.mark.parametrize("size, half", [((64, 32), False), (BOXMOT_SIZE, False), ((64, 32), True)], ids=str)
def test_boxmot_gets_our_features_from_its_own_input(people, tmp_path, size, half):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, processor = small(size, neck_feature="after")
    file = tmp_path / "osnet_x0_25_personvit.onnx"
    export_boxmot(model, processor, file, half=half)
    session = onnxruntime.InferenceSession(file)
    frame, boxes = frame_of(people)
    # from the crop as BoxMOT has resized it, the file computes what the model does
    resized = [cv2.resize(crop, BOXMOT_SIZE[::-1]) for crop in people]
    pixel_values = np.stack([cv2.cvtColor(crop, cv2.COLOR_BGR2RGB) for crop in resized]).transpose(0, 3, 1, 2)
    own = torch.from_numpy(pixel_values).float() / 255
    own = (own - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    if size != BOXMOT_SIZE:
        own = torch.nn.functional.interpolate(own, size, mode="bilinear")
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(model(own).embeddings, dim=-1).numpy()
    found = as_boxmot(session, boxes, frame)
    np.testing.assert_allclose(found, wanted, atol=2e-2 if half else 1e-4)
    assert as_boxmot(session, boxes[:1], frame).shape == (1, 32)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.05  # else anything would agree


def test_deep_sort_realtime_takes_it_for_its_embedder(people):
    tracker_module = pytest.importorskip("deep_sort_realtime.deepsort_tracker")
    tracker = tracker_module.DeepSort(embedder=None, n_init=1)
    tracker.embedder = TrackerEmbedder(*small())
    frame, boxes = frame_of(people)
    detections = [([left, top, right - left, bottom - top], 0.9, "person") for left, top, right, bottom in boxes]
    for _ in range(3):
        tracks = tracker.update_tracks(detections, frame=frame)
    assert len({track.track_id for track in tracks if track.is_confirmed()}) == 6
