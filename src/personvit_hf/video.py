"""Videos to crops of people with track ids, as parquet shards.

For each video: boxes of people, from a detector or a file; tracks of these boxes; and the crops of those that are
large, sharp, whole and unoccluded. Detections and crops are written in chunks of frames, each whole or not at all, so
a run that was killed goes on after the last chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import datasets
import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .files import written_aside
from .tracks import Boxes, CropRules, link_boxes, read_boxes, reasons_against, sharpness

if TYPE_CHECKING:
    from .detection import PersonDetector

CHUNK_FRAMES = 500
MAX_GAP = 5  # a track that isn't seen in so many of the frames looked at, one after the other, ends
DETECTOR_SCORE = 0.5
DETECTOR_BATCH = 4
# A head is about a seventh of a standing person, but boxes have margins, and people bend.
HEAD_SHARE = 0.3
MAX_TRACKS = 10**6  # of a video: track ids are video * MAX_TRACKS + track
JPEG_QUALITY = 95
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "track_id": datasets.Value("int64"),
        "camera_id": datasets.Value("int64"),
        "frame": datasets.Value("int64"),
        "video": datasets.Value("string"),
        "score": datasets.Value("float32"),
    }
)
_METADATA = b"personvit"
_README = """---
configs:
- config_name: unlabelled
  default: true
  data_files:
  - split: train
    path: train-*.parquet
---

# Crops of people from videos

Made by `personvit data from-video`. {summary}

`track_id` tells crops of one person's walk through the picture: not who it is, and a person who comes back gets
another. `camera_id` is the number of the video. {heads} Check what your law and the people filmed allow before you
use or share these crops.
"""


@dataclass
class VideoReport:
    """What became of every box: boxes == kept + skipped.

    Attributes:
        videos: Number of videos.
        frames: Frames looked at.
        tracks: Tracks with a crop.
        kept: Crops.
        skipped: {reason: number of boxes}.
        new_chunks: Chunks of crops written by this run.
    """

    videos: int = 0
    frames: int = 0
    tracks: int = 0
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    new_chunks: int = 0

    def __str__(self) -> str:
        """One line of figures, then one a reason."""
        skipped = sum(self.skipped.values())
        lines = [
            f"{self.videos} videos, {self.frames} frames, {self.kept + skipped} boxes: kept {self.kept} crops of "
            f"{self.tracks} tracks, skipped {skipped}"
        ]
        return "\n".join(lines + [f"  {count} skipped, {reason}" for reason, count in self.skipped.most_common()])


class VideoFrames:
    """The frames of a video file.

    Args:
        path: Anything that OpenCV's FFmpeg reads.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no video.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such video.")
        good, first = self._opened().read()
        if not good:
            raise ValueError(f"{path}: no video that can be read.")
        self.size = first.shape[:2]
        self.end: int | None = None  # the last frame's number, once it was reached
        self._capture: cv2.VideoCapture | None = None
        self._grabbed = 0  # the number of the frame that it is at

    @property
    def count(self) -> int:
        """Number of frames; by decoding them, since what a file says of itself may be wrong, or cut off."""
        if self.end is None:
            self.end = _grabs(self._opened())
        return self.end

    def count_with(self, last: int) -> int:
        """Number of frames, or more: not fewer than there are of the frames up to `last`.

        Packets are counted, without decoding. A damaged one, and a hidden one of some formats, is no frame; where
        `last` is behind them the frames decide.
        """
        capture = self._opened()
        packets = _grabs(capture) if capture.set(cv2.CAP_PROP_FORMAT, -1) else 0
        return packets if last <= packets else self.count

    def _opened(self) -> cv2.VideoCapture:
        return cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG)

    def read(self, wanted: Callable[[int], bool], start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number from 1, uint8 RGB (height, width, 3)) of the wanted frames from `start` up to before `stop`.

        The file stays open until `close`, so that calls for later and later frames decode each frame once.
        """
        for number in filter(wanted, range(start, stop)):
            if (self.end is not None and number > self.end) or not self._go_to(number):
                return
            good, frame = self._capture.retrieve()
            if good:
                yield number, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def close(self) -> None:
        """Lets go of the file and its decoder; the next `read` opens it anew."""
        if self._capture is not None:
            self._capture.release()
        self._capture = None

    def _go_to(self, number: int) -> bool:
        """Whether a frame is there; by way of all before it, since seeking is not exact in all formats."""
        if self._capture is None or number <= self._grabbed:
            self.close()
            self._capture, self._grabbed = self._opened(), 0
        while self._grabbed < number:
            if not self._capture.grab():
                self.end = self._grabbed
                self.close()
                return False
            self._grabbed += 1
        return True


def _grabs(capture: cv2.VideoCapture) -> int:
    count = 0
    while capture.grab():
        count += 1
    return count


def crops_from_videos(
    videos: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    boxes: Sequence[str | os.PathLike] | None = None,
    detector: str = "fasterrcnn_mobilenet_v3_large_320_fpn",
    detector_weights: str | os.PathLike | None = None,
    stride: int = 1,
    rules: CropRules | None = None,
    blur_heads: bool = False,
    progress: bool = False,
) -> VideoReport:
    """Writes crops of the people in videos to `train-<video>-<chunk>.parquet`, with README.md and report.json.

    A run that was cut off goes on when it is started again with the same arguments.

    Args:
        videos: The files.
        out: The folder.
        boxes: For each video a file of boxes (see `read_boxes`); None to detect them.
        detector: One of torchvision's.
        detector_weights: As in `PersonDetector`.
        stride: Of how many frames one is looked at by the detector, or was for the boxes.
        rules: Which boxes become crops; None for the defaults (with a detector: of a score from 0.5 on).
        blur_heads: Whether to blur the upper 30% of each crop, where faces are in all but very loose boxes. It is
            blurred in every crop, with or without a visible face: detectors miss many of so small faces.
        progress: Whether to show progress bars.

    Returns:
        The report: every box is kept or skipped for a reason.

    Raises:
        FileNotFoundError: A file is missing, or the detector's weights can't be fetched.
        ValueError: A file can't be read, numbers of videos and boxes differ, `out` holds other crops, or another
            process is at work in it.
        OSError: A shard can't be written.
    """
    if not videos or (boxes is not None and len(boxes) != len(videos)):
        raise ValueError(
            f"{len(videos)} videos and {len(boxes or ())} files of boxes: give one for each video, in order."
        )
    if stride < 1:
        raise ValueError(f"`stride` must be 1 or more, got {stride}.")
    rules = rules or CropRules(min_score=DETECTOR_SCORE if boxes is None else None)
    given = None if boxes is None else [read_boxes(file) for file in boxes]
    opened = [VideoFrames(video) for video in videos]
    find = _detector(detector, detector_weights) if boxes is None else None  # may fail: before `out` is claimed
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    source = {"detector": detector, "weights": str(detector_weights)}
    if boxes is not None:
        source = {"boxes": [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in boxes]}
    try:
        with filelock.FileLock(out / ".from-video.lock", timeout=0):
            files = [[video.path.name, video.path.stat().st_size] for video in opened]
            _claim(
                out, {"videos": files, **source, "stride": stride, "rules": asdict(rules), "blur_heads": blur_heads}
            )
            if given is None:
                given = [_detect(video, i, find, stride, out, progress) for i, video in enumerate(opened)]
            report = VideoReport(videos=len(opened))
            for index, (video, found) in enumerate(zip(opened, given, strict=True)):
                report.frames += -(-video.count // stride) if boxes is None else len(np.unique(found.frames))
                count = video.count if boxes is None else video.count_with(int(found.frames.max(initial=0)))
                found = _usable(found, count, rules, report)
                tracks = link_boxes(found, max_gap=MAX_GAP * stride)
                _write_crops(video, index, count, found, tracks, out, rules, blur_heads, report, progress)
            _finish(out, report, blur_heads)
    except filelock.Timeout as error:
        raise ValueError(f"{out}: another process is cutting crops here; wait for it.") from error
    return report


def _detector(name: str, weights: str | os.PathLike | None) -> PersonDetector:
    from .detection import PersonDetector  # and with it torch, which boxes from a file do without

    return PersonDetector(name, weights)


def _claim(out: Path, settings: dict) -> None:
    """Notes what the folder's crops are made of; a ValueError if it holds others."""
    file = out / "from-video.json"
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    shards = list(out.glob("*.parquet"))
    if not file.exists() and shards:
        raise ValueError(f"{out}: holds parquet files of another source. Choose another folder.")
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        if any(out.glob("detections-*.json")) or any(map(_has_crops, shards)):
            raise ValueError(f"{out}: holds crops of other videos or settings ({file.name}). Choose another folder.")
        for shard in shards:  # of a start that found nothing
            shard.unlink()
        with written_aside(file, overwrite=True) as part:
            part.write_text(text, encoding="utf-8")
    for leftover in [*out.glob(".train-*"), *out.glob(".detections-*")]:  # of a run that was killed
        shutil.rmtree(leftover)


def _chunks(count: int, index: int) -> list[tuple[str, int, int]]:
    """(name, first frame, frame after the last) of each chunk of a video of `count` frames."""
    starts = range(1, count + 1, CHUNK_FRAMES)
    return [
        (f"{index:04}-{start // CHUNK_FRAMES:05}", start, min(start + CHUNK_FRAMES, count + 1)) for start in starts
    ]


def _detect(video: VideoFrames, index: int, detector: PersonDetector, stride: int, out: Path, progress: bool) -> Boxes:
    """Boxes of a video; each chunk's are kept in a file."""
    rows: list[tuple[int, list[float], float, int]] = []
    with tqdm(total=video.count, desc=f"{video.path.name}: detecting", unit=" frames", disable=not progress) as bar:
        for name, start, stop in _chunks(video.count, index):
            file = out / f"detections-{name}.json"
            if not file.exists():
                found = []
                for numbers, frames in _batches(video.read(lambda n: (n - 1) % stride == 0, start, stop)):
                    for number, (boxes, scores) in zip(numbers, detector(frames), strict=True):
                        found += [
                            {"frame": number, "box": box, "score": score}
                            for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)
                        ]
                    bar.update(numbers[-1] + stride - numbers[0])
                with written_aside(file) as part:
                    part.write_text(json.dumps(found))
            chunk = read_boxes(file)
            columns = (chunk.frames, chunk.boxes, chunk.scores, chunk.track_ids)
            rows += zip(*(column.tolist() for column in columns), strict=True)
    video.close()
    return Boxes.from_rows(rows)


def _batches(frames: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    numbers: list[int] = []
    pictures: list[np.ndarray] = []
    for number, frame in frames:
        numbers.append(number)
        pictures.append(frame)
        if len(numbers) == DETECTOR_BATCH:
            yield numbers, pictures
            numbers, pictures = [], []
    if numbers:
        yield numbers, pictures


def _usable(boxes: Boxes, count: int, rules: CropRules, report: VideoReport) -> Boxes:
    """Boxes that may be tracked."""
    good = boxes.scores >= (-np.inf if rules.min_score is None else rules.min_score)
    there = boxes.frames <= count
    _count(report.skipped, "low score", int((there & ~good).sum()))
    _count(report.skipped, "frame not in the video", int((~there).sum()))
    return boxes[good & there]


def _write_crops(
    video: VideoFrames,
    index: int,
    count: int,
    boxes: Boxes,
    tracks: np.ndarray,
    out: Path,
    rules: CropRules,
    blur_heads: bool,
    report: VideoReport,
    progress: bool,
) -> None:
    if len(tracks) and tracks.max() >= MAX_TRACKS:
        raise ValueError(f"{video.path}: {tracks.max() + 1} tracks; more than {MAX_TRACKS} are refused.")
    reasons = reasons_against(boxes, tracks, video.size, rules)
    report.skipped.update(reason for reason in reasons if reason)
    by_frame: dict[int, list[int]] = {}
    for box, reason in enumerate(reasons):
        if reason is None:
            by_frame.setdefault(int(boxes.frames[box]), []).append(box)
    seen: set[int] = set()
    with tqdm(total=count, desc=f"{video.path.name}: cropping", unit=" frames", disable=not progress) as bar:
        for name, start, stop in _chunks(count, index):
            path = out / f"train-{name}.parquet"
            told = _finished(path)
            if told is None:
                rows, told = _crops(video, index, by_frame, boxes, tracks, start, stop, rules, blur_heads)
                _write_shard(path, rows, told)
                report.new_chunks += 1
            report.kept += told["kept"]
            report.skipped.update(told["skipped"])
            seen |= set(told["tracks"])
            bar.update(stop - start)
    video.close()
    report.tracks += len(seen)


def _crops(
    video: VideoFrames,
    index: int,
    by_frame: dict[int, list[int]],
    boxes: Boxes,
    tracks: np.ndarray,
    start: int,
    stop: int,
    rules: CropRules,
    blur_heads: bool,
) -> tuple[list[dict], dict]:
    """The rows of a chunk, and what is told of them."""
    rows: list[dict] = []
    skipped: Counter[str] = Counter()
    expected = {frame: len(by_frame[frame]) for frame in range(start, stop) if frame in by_frame}
    for number, frame in video.read(by_frame.__contains__, start, stop):
        for box in by_frame[number]:
            crop = cut_out(frame, boxes.boxes[box])
            if sharpness(crop) < rules.min_sharpness:
                skipped["blurred"] += 1
                continue
            track = index * MAX_TRACKS + int(tracks[box])
            name = f"{video.path.name}/{track:010}/{number:08}.jpg"
            content = encode(blur_head(crop) if blur_heads else crop)
            rows.append(
                {
                    "image": {"bytes": content, "path": name},
                    "track_id": track,
                    "camera_id": index,
                    "frame": number,
                    "video": video.path.name,
                    "score": float(boxes.scores[box]),
                }
            )
    if video.end is not None:  # reached while reading
        behind = sum(number for frame, number in expected.items() if frame > video.end)
        _count(skipped, "frame not in the video", behind)
    _count(skipped, "frame can't be decoded", sum(expected.values()) - len(rows) - sum(skipped.values()))
    kept_tracks = sorted({row["track_id"] for row in rows})
    return rows, {"kept": len(rows), "skipped": dict(skipped), "tracks": kept_tracks}


def cut_out(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part of a frame, uint8 (height, width, 3), under a box, as far as it is inside; at least one pixel."""
    height, width = frame.shape[:2]
    left, top = max(0, min(int(box[0]), width - 1)), max(0, min(int(box[1]), height - 1))
    right, bottom = (int(np.ceil(box[side] + box[side + 2])) for side in (0, 1))
    return frame[top : max(top + 1, min(bottom, height)), left : max(left + 1, min(right, width))]


def blur_head(crop: np.ndarray) -> np.ndarray:
    """The crop, uint8 (height, width, 3), with its upper 30% blurred beyond recognition, over its whole width."""
    head = max(1, round(HEAD_SHARE * len(crop)))
    blurred = crop.copy()
    # Few large pixels first: a mere Gaussian can be undone in part.
    small = cv2.resize(crop[:head], (max(1, crop.shape[1] * 4 // head), 4), interpolation=cv2.INTER_AREA)
    blurred[:head] = cv2.resize(small, (crop.shape[1], head), interpolation=cv2.INTER_LINEAR)
    return blurred


def encode(crop: np.ndarray) -> bytes:
    """A crop, uint8 RGB (height, width, 3), as JPEG."""
    _, content = cv2.imencode(".jpg", cv2.cvtColor(crop, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return content.tobytes()


def _write_shard(path: Path, rows: list[dict], told: dict) -> None:
    table = pa.Table.from_pylist(rows, FEATURES.arrow_schema)
    metadata = {**(table.schema.metadata or {}), _METADATA: json.dumps(told).encode()}
    try:
        with written_aside(path, overwrite=True) as part:
            with pq.ParquetWriter(part, table.schema.with_metadata(metadata)) as writer:
                if rows:  # `datasets` can't read a row group without rows; a file without a row group it can
                    writer.write_table(table.replace_schema_metadata(metadata))
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} can't be written ({error.strerror or error}); make room and run the same command again",
        ) from error


def _finished(path: Path) -> dict | None:
    """What is told of a chunk that is there, or None if it must be written."""
    try:
        return json.loads(pq.read_metadata(path).metadata[_METADATA])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None


def _has_crops(shard: Path) -> bool:
    try:
        return pq.read_metadata(shard).num_rows > 0
    except (OSError, pa.ArrowInvalid):
        return True  # not known


def _count(counter: Counter[str], reason: str, number: int) -> None:
    if number:
        counter[reason] += number


def _finish(out: Path, report: VideoReport, blur_heads: bool) -> None:
    if not report.kept:
        raise ValueError(f"{out}: no crop can be kept.\n{report}")
    heads = f"The upper {HEAD_SHARE:.0%} of each crop is blurred." if blur_heads else "Faces are not blurred."
    figures = {name: value for name, value in vars(report).items() if name != "new_chunks"}
    texts = {
        "README.md": _README.format(summary=str(report).splitlines()[0] + ".", heads=heads),
        "report.json": json.dumps(figures, indent=1),
    }
    for name, text in texts.items():
        with written_aside(out / name, overwrite=True) as part:
            part.write_text(text, encoding="utf-8")
