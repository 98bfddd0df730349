"""Boxes of people in the frames of a video: where they come from, which belong together, which make good crops."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

MAX_BOXES_FILE_BYTES = 2**30
MAX_FRAME = 10**8
_SHARPNESS_SIZE = (64, 128)  # (width, height): sharpness is compared at one size
_COCO_PERSON = 1


@dataclass(frozen=True)
class Boxes:
    """Boxes of one video, sorted by frame.

    Attributes:
        frames: int64 (boxes,), from 1.
        boxes: float32 (boxes, 4): left, top, width, height in pixels.
        scores: float32 (boxes,); 1 where the source has none.
        track_ids: int64 (boxes,), -1 where the source has none.
    """

    frames: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    track_ids: np.ndarray

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[int, Sequence[float], float, int]]) -> Boxes:
        """Boxes of (frame, box, score, track_id) in any order."""
        rows = sorted(rows, key=lambda row: row[0])
        return cls(
            np.array([row[0] for row in rows], np.int64),
            np.array([row[1] for row in rows], np.float32).reshape(-1, 4),
            np.array([row[2] for row in rows], np.float32),
            np.array([row[3] for row in rows], np.int64),
        )

    def __getitem__(self, chosen: np.ndarray) -> Boxes:
        """Some of them, by a mask or by indices in order."""
        return Boxes(self.frames[chosen], self.boxes[chosen], self.scores[chosen], self.track_ids[chosen])

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self.frames)


@dataclass(frozen=True)
class CropRules:
    """Which boxes become crops.

    Args:
        min_score: Smallest score of a box; None for any.
        min_height: Smallest height in pixels.
        aspects: Smallest and largest height / width.
        min_inside: Smallest share of the box inside the frame.
        max_occlusion: Largest share of the box that may lie under the box of somebody in front (whose foot is lower).
        min_sharpness: Smallest `sharpness` of the crop. Of MOTChallenge 2015's crops 1% are below 30, and 95% of the
            same crops blurred by a Gaussian of 3 pixels.
        min_track_boxes: Boxes that a track must have; shorter ones are often no people.
        every: Frames between two crops of a track, at least.

    Raises:
        ValueError: A number is out of its range.
    """

    min_score: float | None = None
    min_height: float = 64
    aspects: tuple[float, float] = (1.2, 5.0)
    min_inside: float = 0.9
    max_occlusion: float = 0.4
    min_sharpness: float = 30.0
    min_track_boxes: int = 5
    every: int = 5

    def __post_init__(self) -> None:
        for name in ("min_inside", "max_occlusion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be a share in [0, 1], got {getattr(self, name)}.")
        for name, least in (("min_height", 1), ("min_sharpness", 0), ("min_track_boxes", 1), ("every", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"`{name}` must be {least} or more, got {getattr(self, name)}.")


def read_boxes(path: str | Path) -> Boxes:
    """Boxes from a file of a tracker or detector.

    Args:
        path: .json: a list of objects with frame (or image_id, as COCO's results) from 1, box (or bbox): [left, top,
            width, height] in pixels, and if known score and track_id; objects whose category_id is not 1, COCO's
            person, are left out. Any other ending: MOTChallenge's lines frame,id,left,top,width,height,score,... In
            lines of nine columns, its ground truth, those that don't count (score 0) or are of another class than 1
            are left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another form; the message says where.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of boxes.")
    if path.stat().st_size > MAX_BOXES_FILE_BYTES:
        raise ValueError(f"{path}: more than {MAX_BOXES_FILE_BYTES} bytes, which no file of boxes has.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text: {error}") from error
    is_json = path.suffix.lower() == ".json"
    if not is_json and (boxes := _mot_boxes(text)) is not None:
        return boxes
    rows = _json_rows(path, text) if is_json else _mot_rows(path, text)
    for where, (frame, box, score, track) in rows:
        sizes_good = all(map(math.isfinite, (*box, score))) and box[2] > 0 and box[3] > 0 and max(map(abs, box)) < 1e6
        if not sizes_good or not 1 <= frame <= MAX_FRAME:
            raise ValueError(
                f"{path}, {where}: expected a frame from 1 and a box left, top, width > 0, height > 0 in pixels; "
                f"found frame {frame}, box {list(box)}, score {score}."
            )
        if not -(2**63) <= track < 2**63:
            raise ValueError(f"{path}, {where}: expected a track id of at most 64 bits, found {track}.")
    return Boxes.from_rows([row for _, row in rows])


Row = tuple[int, tuple[float, ...], float, int]


def _json_rows(path: Path, text: str) -> list[tuple[str, Row]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of boxes, found {type(found).__name__}.")
    rows = []
    for number, entry in enumerate(found):
        try:
            if entry.get("category_id", _COCO_PERSON) != _COCO_PERSON:
                continue
            box = _first(entry, "box", "bbox")
            frame, track = _whole(_first(entry, "frame", "image_id")), _whole(entry.get("track_id", -1))
            left, top, width, height = (float(side) for side in box)
            row = (frame, (left, top, width, height), float(entry.get("score", 1.0)), track)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f'{path}, entry {number}: expected {{"frame": 1, "box": [left, top, width, height], "score": 0.9}}, '
                f"found {str(entry)[:100]}."
            ) from error
        rows.append((f"entry {number}", row))
    return rows


def _first(entry: dict[str, Any], *names: str) -> Any:
    return next(entry[name] for name in names if name in entry) if set(names) & entry.keys() else entry[names[0]]


def _whole(number: Any) -> int:
    if int(number) != float(number):
        raise ValueError(f"{number} is no whole number")
    return int(number)


def _mot_boxes(text: str) -> Boxes | None:
    """What `_mot_rows` makes of a file without fault, much faster; None if anything is odd, which it will name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of an empty file
            lines = np.loadtxt(text.splitlines(), delimiter=",", comments=None, ndmin=2)
    except (ValueError, UserWarning):
        return None
    whole = lines[:, :2]
    if lines.shape[1] < 6 or not (np.abs(whole) < 2**53).all() or (whole != np.floor(whole)).any():
        return None
    if lines.shape[1] == 9:
        lines = lines[(lines[:, 6] != 0) & (lines[:, 7] == 1)]
    frames, boxes = lines[:, 0], lines[:, 2:6]
    scores = lines[:, 6] if lines.shape[1] > 6 else np.ones(len(lines))
    in_range = (np.abs(boxes) < 1e6).all() and (boxes[:, 2:] > 0).all() and np.isfinite(scores).all()
    if not in_range or (frames < 1).any() or (frames > MAX_FRAME).any():
        return None
    order = np.argsort(frames, kind="stable")
    columns = (
        frames.astype(np.int64),
        boxes.astype(np.float32),
        scores.astype(np.float32),
        lines[:, 1].astype(np.int64),
    )
    return Boxes(*(column[order] for column in columns))


def _mot_rows(path: Path, text: str) -> list[tuple[str, Row]]:
    rows = []
    for number, fields in enumerate(csv.reader(text.splitlines()), start=1):
        if not fields:
            continue
        try:
            values = [float(value) for value in fields]
            left, top, width, height = values[2:6]
            score = values[6] if len(values) > 6 else 1.0
            row = (_whole(values[0]), (left, top, width, height), score, _whole(values[1]))
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"{path}, line {number}: expected frame,id,left,top,width,height,score; found "
                f"{','.join(fields)[:100]!r}."
            ) from error
        if len(values) == 9 and (values[6] == 0 or values[7] != 1):
            continue
        rows.append((f"line {number}", row))
    return rows


def overlaps(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(intersection in pixels, intersection over union) of each two boxes, float32 (first, second)."""
    ends = first[:, None, :2] + first[:, None, 2:], second[None, :, :2] + second[None, :, 2:]
    sides = np.minimum(*ends) - np.maximum(first[:, None, :2], second[None, :, :2])
    intersection = np.clip(sides, 0, None).prod(axis=2)
    areas = first[:, 2:].prod(axis=1)[:, None] + second[:, 2:].prod(axis=1)[None]
    return intersection, intersection / np.maximum(areas - intersection, 1e-9)


def _frame_slices(boxes: Boxes) -> list[tuple[int, int]]:
    """Where the boxes of each frame begin and end."""
    starts = np.flatnonzero(np.diff(boxes.frames, prepend=-1)).tolist()
    return list(zip(starts, [*starts[1:], len(boxes)][: len(starts)], strict=True))


def link_boxes(boxes: Boxes, min_iou: float = 0.5, max_gap: int = 5) -> np.ndarray:
    """Track of each box: the same number while a box overlaps the track's last one, pairs that overlap most first.

    The defaults rather break a track than join two people. Of the 18 people of MOTChallenge 2015's TUD sequences the
    true boxes make 18 tracks without an error. Half of these boxes, taken at random, make 51 tracks, in which 99% of
    the boxes are of the track's main person (with 0.3 and 10: 21 tracks, 81%).

    Args:
        boxes: Of one video. Boxes that come with a track id keep it, if all of them do.
        min_iou: Least intersection over union with the last box.
        max_gap: Most frames from a track's last box to its next: it ends when it isn't seen in so many in a row.

    Returns:
        int64 (boxes,), from 0 in the order in which tracks begin (or of the ids that came with the boxes).
    """
    if len(boxes) and (boxes.track_ids >= 0).all():
        return np.unique(boxes.track_ids, return_inverse=True)[1].astype(np.int64)
    tracks = np.full(len(boxes), -1, np.int64)
    last: dict[int, int] = {}  # a track's last box
    count = 0
    for start, stop in _frame_slices(boxes):
        last = {track: box for track, box in last.items() if boxes.frames[start] - boxes.frames[box] <= max_gap}
        _, shares = overlaps(boxes.boxes[list(last.values())], boxes.boxes[start:stop])
        names = list(last)
        taken: set[int] = set()
        for pair in np.argsort(-shares, axis=None, kind="stable"):
            before, now = divmod(int(pair), stop - start)
            if shares[before, now] < min_iou:
                break
            if names[before] not in taken and tracks[start + now] < 0:
                tracks[start + now] = names[before]
                taken.add(names[before])
        for box in range(start, stop):
            if tracks[box] < 0:
                tracks[box], count = count, count + 1
            last[int(tracks[box])] = box
    return tracks


def occlusions(boxes: Boxes) -> np.ndarray:
    """Largest share of each box that lies under another of its frame whose foot is lower, and so in front: float32."""
    hidden = np.zeros(len(boxes), np.float32)
    for start, stop in _frame_slices(boxes):
        frame = boxes.boxes[start:stop]
        intersection, _ = overlaps(frame, frame)
        feet = frame[:, 1] + frame[:, 3]
        in_front = feet[None] > feet[:, None]
        hidden[start:stop] = (intersection * in_front).max(axis=1) / frame[:, 2:].prod(axis=1)
    return hidden


def sharpness(crop: np.ndarray) -> float:
    """Variance of the Laplacian of the crop, uint8 (height, width, 3), in grey and at 128x64: low if it is blurred."""
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(cv2.resize(grey, _SHARPNESS_SIZE, interpolation=cv2.INTER_AREA), cv2.CV_64F).var())


def reasons_against(
    boxes: Boxes, tracks: np.ndarray, frame_size: tuple[int, int], rules: CropRules
) -> list[str | None]:
    """Why each box makes no crop, as far as the boxes tell; None for the others.

    Args:
        boxes: Of one video.
        tracks: As of `link_boxes`.
        frame_size: (height, width) of a frame in pixels.
        rules: The limits.
    """
    height, width = frame_size
    frame = np.array([[0, 0, width, height]], np.float32)
    inside = overlaps(boxes.boxes, frame)[0][:, 0] / boxes.boxes[:, 2:].prod(axis=1)
    aspects = boxes.boxes[:, 3] / boxes.boxes[:, 2]
    lengths = np.bincount(tracks, minlength=1)[tracks] if len(tracks) else np.zeros(0, int)
    checks = (
        ("small", boxes.boxes[:, 3] < rules.min_height),
        ("not the shape of a person", (aspects < rules.aspects[0]) | (aspects > rules.aspects[1])),
        ("cut by the frame", inside < rules.min_inside),
        ("occluded", occlusions(boxes) > rules.max_occlusion),
        ("short track", lengths < rules.min_track_boxes),
    )
    reasons: list[str | None] = [None] * len(boxes)
    for reason, bad in checks:
        for box in np.flatnonzero(bad):
            reasons[box] = reasons[box] or reason
    latest: dict[int, int] = {}  # the last frame kept of each track
    for box, track in enumerate(tracks.tolist()):
        if reasons[box] is None:
            frame_number = int(boxes.frames[box])
            if track in latest and frame_number - latest[track] < rules.every:
                reasons[box] = "soon after another of its track"
            else:
                latest[track] = frame_number
    return reasons
