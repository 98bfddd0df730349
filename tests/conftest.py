"""Settings every test shares; they must stand before the first import of a Hugging Face library."""

import atexit
import os
import tempfile

import pytest
from hypothesis import settings

# Tests neither reach the Hub nor read or fill the caches and the accelerate configuration of whoever runs them.
_hugging_face_home = tempfile.TemporaryDirectory(prefix="personvit-tests-")
atexit.register(_hugging_face_home.cleanup)
os.environ["HF_HOME"] = _hugging_face_home.name
os.environ["HF_HUB_OFFLINE"] = "1"
# Where DeepSpeed is installed and finds no GPU, it would say so on the standard output of whatever imports it.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# The same examples in every run, and no failure because a machine is busy.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of `datasets` for this test alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
