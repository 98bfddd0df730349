"""transformers' own common tests on our models; pip fetches its source archive for them, as its wheel has no tests."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

# Parts of the tests that the source archive lacks, too: for generation and exporters, which our models have none of.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin: ...",
    "generation/test_utils.py": "class GenerationTesterMixin: ...",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}",
}
# This one gives `bool_masked_pos` the shape of a single view; test_modeling_personvit_pretraining.py has our own.
LEFT_OUT = "not (PreTraining and test_eager_matches_sdpa_inference)"


@pytest.fixture
def folder(tmp_path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", "transformers", "--dest", tmp_path, f"transformers=={transformers.__version__}"]
    if subprocess.run(command, capture_output=True, timeout=300).returncode:
        pytest.skip("pip reaches no source archive of transformers")
    with tarfile.open(next(tmp_path.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    common = tmp_path / "common"
    shutil.move(next(tmp_path.glob("transformers-*/tests")), common)
    for name, text in {**STUBS, "__init__.py": ""}.items():
        (common / name).parent.mkdir(exist_ok=True)
        (common / name).parent.joinpath("__init__.py").touch()
        (common / name).write_text(text + "\n")
    shutil.copyfile(Path(__file__).with_name("common_cases.py"), tmp_path / "test_cases.py")
    return tmp_path


@pytest.mark.slow
def test_our_models_pass(folder):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, "test_cases.py"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout.splitlines()[-1]
