"""examples/track.py as a user runs it, and that its made video tells the truth."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from app_server import DATA, small_checkpoint

pytest.importorskip("deep_sort_realtime")
pytest.importorskip("motmetrics")
SCRIPT = str(Path(__file__).parents[1] / "examples" / "track.py")


def test_the_made_video_shows_each_person_where_it_says():
    pictures = [np.full((40, 20, 3), 200 + 10 * i, np.uint8) for i in range(3)]
    args = SimpleNamespace(num_people=3, num_frames=60)
    video = list(runpy.run_path(SCRIPT)["made_video"](pictures, np.array([1, 2, 3]), args, seed=0))
    assert len(video) == 60
    shown = found = 0
    for frame, ids, boxes, detected in video:
        assert frame.shape == (360, 640, 3) and frame.dtype == np.uint8
        assert len(ids) == len(boxes) >= len(detected)
        shown, found = shown + len(ids), found + len(detected)
        for left, top, right, bottom in np.clip(boxes, 0, [640, 360, 640, 360]).astype(int):
            share = (frame[top:bottom, left:right, 0] >= 200).mean()  # brighter than the background can be
            assert share > 0.9
    assert 0.8 * shown < found < shown  # the detector misses some


@pytest.mark.slow
def test_as_a_user_runs_it(tmp_path):
    command = [sys.executable, SCRIPT, "--model", small_checkpoint(tmp_path, 0), "--data", DATA]
    command += ["--num_frames", "30", "--num_people", "4", "--seeds", "2"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = process.stdout.splitlines()
    assert rows[0].split()[:3] == ["IDF1", "switches", "MOTA"] and len(rows) == 5
    means = [float(line[20:].split()[0]) for line in rows[1:]]
    assert means[3] == pytest.approx(means[2] - means[1], abs=0.11)  # the difference of what stands above it
    assert all(" ± " in row for row in rows[1:])
