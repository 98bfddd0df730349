"""Trackers with and without our features, on a made video with known people or on one of yours.

    python examples/track.py --model runs/finetuned
    python examples/track.py --model runs/finetuned --video vtest.avi

Without `--video`, the test people of `--data` cross before a noisy background, hide each other, are missed by the
detector, and turn round where nobody sees it; what they look like changes between their pictures. There motmetrics
scores IDF1 and identity switches. Of a real video nobody's identity is known: what moves is found by background
subtraction, and the tracks are only counted. Needs pip install '.[track]' (deep-sort-realtime and motmetrics).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from torchvision.ops import box_iou

from personvit_hf.extras import require
from personvit_hf.person_images import PersonImages
from personvit_hf.reid_data import load_reid_dataset
from personvit_hf.scripting import option, parse_arguments
from personvit_hf.tracking import TrackerEmbedder

EXAMPLES = Path(__file__).resolve().parent
HEIGHT, WIDTH = 360, 640
# Crops (BGR) to features
Predict = Callable[[list[np.ndarray]], list[np.ndarray]]
# A frame (BGR), the people's ids and true boxes, detected boxes; boxes are (number, 4), xyxy
Seen = tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray]


@dataclass
class TrackArguments:
    model: str = field(metadata={"help": "Fine-tuned checkpoint."})
    data: str = option(
        str(EXAMPLES / "data"), "Labelled data set: thresholds from its train, people from its gallery."
    )
    video: str = option("", "Video of your own, in place of the made one.")
    num_frames: int = option(300, "Frames.")
    num_people: int = option(10, "People in the made video.")
    seeds: int = option(10, "Made videos.")


def histogram(crops: list[np.ndarray]) -> list[np.ndarray]:
    """Colour histograms of six stripes, the plain thing to compare with."""
    features = []
    for crop in crops:
        hsv = cv2.cvtColor(cv2.resize(crop, (32, 96)), cv2.COLOR_BGR2HSV)
        stripes = [cv2.calcHist([part], [0, 1], None, [16, 8], [0, 180, 0, 256]) for part in np.split(hsv, 6)]
        feature = np.sqrt(np.concatenate(stripes).ravel())
        features.append(feature / np.linalg.norm(feature))
    return features


def made_video(pictures: list[np.ndarray], people: np.ndarray, args: TrackArguments, seed: int) -> Iterator[Seen]:
    """Frames, and for each the people's ids, true boxes and detected boxes (xyxy); nobody is drawn by hand."""
    rng = np.random.default_rng(seed)
    names = rng.choice(sorted(set(people[people > 0])), args.num_people, replace=False)
    background = cv2.resize(rng.integers(90, 166, (9, 16, 3), dtype=np.uint8), (WIDTH, HEIGHT))
    x, floor = rng.uniform(0, WIDTH, args.num_people), np.sort(rng.uniform(170, HEIGHT, args.num_people))
    speed = rng.uniform(2, 6, args.num_people) * rng.choice([-1, 1], args.num_people)
    looks = {name: np.flatnonzero(people == name) for name in names}
    look = [rng.choice(looks[name]) for name in names]
    for _ in range(args.num_frames):
        frame = np.clip(background + rng.normal(0, 4, background.shape), 0, 255).astype(np.uint8)
        owner = np.full((HEIGHT, WIDTH), -1)
        boxes = []
        for i in range(len(names)):  # nearer people last, over the others
            height = int(0.4 * floor[i])
            left, right, bottom = int(x[i] - height / 4), int(x[i] + height / 4), int(floor[i])
            picture = cv2.resize(pictures[look[i]][:, :, ::-1], (right - left, height))
            a, b = max(left, 0), min(right, WIDTH)
            if b > a:
                frame[bottom - height : bottom, a:b] = picture[:, a - left : b - left]
                owner[bottom - height : bottom, a:b] = i
            boxes.append([left, bottom - height, right, bottom])
        boxes = np.array(boxes, float)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        visible = np.array([(owner == i).sum() for i in range(len(names))]) / areas
        seen = np.flatnonzero(visible > 0.4)
        found = seen[rng.random(len(seen)) > 0.1]
        noise = rng.normal(0, 0.03, (len(found), 4)) * (boxes[found, 3] - boxes[found, 1])[:, None]
        yield frame, seen, boxes[seen], boxes[found] + noise
        x += speed
        turn = (x < -30) | (x > WIDTH + 30) | ((visible < 0.4) & (rng.random(len(names)) < 0.1))
        x = np.clip(x, -30, WIDTH + 30)
        speed[turn] *= -1
        for i in np.flatnonzero(turn | (rng.random(len(names)) < 0.03)):
            look[i] = rng.choice(looks[names[i]])  # another of their pictures, maybe of another camera


def real_video(path: str, num_frames: int) -> Iterator[Seen]:
    """Frames and what moves in them; ids and true boxes are not known."""
    capture, subtractor = cv2.VideoCapture(path), cv2.createBackgroundSubtractorMOG2(detectShadows=True)
    for _ in range(num_frames):
        good, frame = capture.read()
        if not good:
            break
        moving = (subtractor.apply(frame, learningRate=0.005) == 255).astype(np.uint8)
        moving = cv2.morphologyEx(moving, cv2.MORPH_CLOSE, np.ones((13, 5), np.uint8))
        blobs = cv2.connectedComponentsWithStats(moving)[2][1:]
        blobs = blobs[(blobs[:, 4] > 400) & (blobs[:, 3] > 1.3 * blobs[:, 2]) & (blobs[:, 2] < 100)].astype(float)
        blobs[:, 2:4] += blobs[:, :2]
        yield frame, None, None, blobs[:, :4]


def threshold(predict: Predict, pictures: list[np.ndarray], people: np.ndarray) -> float:
    """The cosine distance that one in twenty pairs of different people lies below."""
    features = np.stack(predict([picture[:, :, ::-1] for picture in pictures]))
    distances, same = 1 - features @ features.T, people[:, None] == people
    pairs = np.triu(np.ones_like(same), 1)  # each once
    return float(np.quantile(distances[pairs & ~same], 0.05))


def track(
    video: Iterator[Seen], predict: Predict | None, max_distance: float
) -> Iterator[tuple[np.ndarray | None, np.ndarray | None, list[int], np.ndarray]]:
    """Yields the true ids and boxes, and the tracks' ids and boxes, of each frame."""
    from deep_sort_realtime.deepsort_tracker import DeepSort

    tracker = DeepSort(max_age=60, embedder=None, max_cosine_distance=max_distance, nn_budget=50)
    for frame, ids, truth, found in video:
        height, width = frame.shape[:2]
        found = np.clip(found, 0, [width, height, width, height])
        found = found[((found[:, 2:] - found[:, :2]) >= 4).all(axis=1)]
        crops = [frame[int(t) : int(b), int(a) : int(r)] for a, t, r, b in found]
        detections = [([a, t, r - a, b - t], 1.0, "person") for a, t, r, b in found]
        # without features no distance is below the threshold, and boxes that overlap are all there is
        embeds = predict(crops) if predict else [np.ones(2) for _ in crops]
        tracks = tracker.update_tracks(detections, embeds=embeds) if detections else tracker.update_tracks([], [])
        shown = [one for one in tracks if one.is_confirmed() and one.time_since_update == 0]
        yield ids, truth, [int(one.track_id) for one in shown], np.array([one.to_ltrb() for one in shown])


def overlap_distances(truth: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """1 - IoU, and NaN for boxes that can't be the same; motmetrics' own function needs a NumPy below 2."""
    truth, boxes = (torch.tensor(np.reshape(part, (-1, 4))) for part in (truth, boxes))
    distances = 1 - box_iou(truth, boxes).numpy()
    return np.where(distances > 0.5, np.nan, distances)


def main() -> None:
    args = parse_arguments(TrackArguments)
    if args.seeds < 2:
        raise ValueError(f"--seeds must be at least 2, for their spread; got {args.seeds}.")
    for module in ("deep_sort_realtime",) if args.video else ("deep_sort_realtime", "motmetrics"):
        require(module, "track")
    dataset = load_reid_dataset(args.data)
    labelled = dataset["train"]
    train, people = PersonImages(labelled), np.array(labelled["person_id"])
    train = [train[i] for i in range(len(train))]
    ours = TrackerEmbedder.from_pretrained(args.model, neck_feature="after").predict
    settings = {"boxes alone (IoU)": (None, -1.0)}
    for name, predict in (("colour histogram", histogram), ("this model", ours)):
        settings[name] = (predict, threshold(predict, train, people))
    if args.video:
        for name, setting in settings.items():
            lengths = {}
            for _, _, ids, _ in track(real_video(args.video, args.num_frames), *setting):
                for i in ids:
                    lengths[i] = lengths.get(i, 0) + 1
            print(f"{name:<20} {len(lengths):>4} tracks, median length {np.median(list(lengths.values())):.0f} frames")
        return
    import motmetrics

    gallery, names = PersonImages(dataset["gallery"]), np.array(dataset["gallery"]["person_id"])
    pictures = [gallery[i] for i in range(len(gallery))]
    print(f"{'':<20} {'IDF1':>12} {'switches':>12} {'MOTA':>12}   mean and deviation of {args.seeds} videos")
    found = {}
    for name, setting in settings.items():
        rows = []
        for seed in range(args.seeds):
            scores = motmetrics.MOTAccumulator(auto_id=True)
            for ids, truth, tracks, boxes in track(made_video(pictures, names, args, seed), *setting):
                scores.update(ids, tracks, overlap_distances(truth, boxes))
            figures = motmetrics.metrics.create().compute(scores, metrics=["idf1", "num_switches", "mota"])
            rows.append(figures.iloc[0].to_numpy(float) * (100, 1, 100))
        found[name] = np.array(rows)
        print(row(name, found[name].mean(axis=0), found[name].std(axis=0, ddof=1)))
    # of the same videos: how hard one is, both share
    gain = found["this model"] - found["colour histogram"]
    print(row("model - histogram", gain.mean(axis=0), gain.std(axis=0, ddof=1) / args.seeds**0.5), "  standard error")


def row(name: str, means: np.ndarray, spreads: np.ndarray) -> str:
    """A line of the table."""
    cells = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in zip(means, spreads, strict=True)]
    return f"{name:<20} {cells[0]:>12} {cells[1]:>12} {cells[2]:>12}"


if __name__ == "__main__":
    main()
