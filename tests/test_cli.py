import json
import subprocess
import sys
from pathlib import Path

import pytest
from golden_fixtures import GOLDEN
from typer.testing import CliRunner

from personvit_hf.cli import app

PERSONVIT = Path(sys.executable).with_name("personvit")


def personvit(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([PERSONVIT, *map(str, arguments)], capture_output=True, text=True)


def test_help_lists_the_commands():
    process = personvit("--help")
    assert process.returncode == 0
    assert "convert" in process.stdout


def test_wrong_input_is_one_line_without_a_traceback(tmp_path):
    process = personvit("convert", tmp_path / "missing.pth", tmp_path / "out")
    assert process.returncode == 1
    assert process.stderr.startswith("personvit: ") and "missing.pth" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_options_are_refused(tmp_path):
    process = personvit("convert", "a.pth", tmp_path, "--taget", "reid")
    assert process.returncode == 2
    assert "--taget" in process.stderr


# convert


@pytest.mark.slow
def test_convert_there_and_back(tmp_path):
    """An official file to a folder, to an official file again, with what was left out told."""
    official = GOLDEN / "official_personvit_reid_sie.pth"
    process = personvit("convert", official, tmp_path / "ours", "--num-attention-heads", 5, "--image-size", "128x64")
    assert process.returncode == 0, process.stderr
    assert "PersonViTForReID of" in process.stdout and "(reid)" in process.stdout
    assert "module.base.fc.weight, module.base.fc.bias (classifier that TransReID never uses)" in process.stdout
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["num_attention_heads"], config["image_size"], config["num_cameras"]) == (5, [128, 64], 6)
    processor = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["size"]["height"]) == ([0.5, 0.5, 0.5], 128)

    process = personvit("convert", tmp_path / "ours", tmp_path / "back.pth", "--to", "official")
    assert process.returncode == 0, process.stderr
    process = personvit("convert", tmp_path / "back.pth", tmp_path / "again", "--num-attention-heads", 5)
    assert process.returncode == 0 and "Left out" not in process.stdout, process.stderr
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "back.pth", "again"}


def test_convert_takes_statistics_and_target(tmp_path):
    options = ("--target", "backbone", "--image-mean", "0.1,0.2,0.3", "--kind", "reid", "--num-attention-heads", 5)
    process = personvit("convert", GOLDEN / "official_personvit_reid.pth", tmp_path, *options)
    assert process.returncode == 0 and process.stdout.startswith("PersonViTModel"), process.stderr
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--image-size", "256,128"], 2, "256,128"),
        (["--image-mean", "half"], 2, "half"),
        (["--to", "onnx"], 2, "ours or official"),
        (["--to", "official", "--target", "reid"], 2, "no other options"),
        (["--target", "gallery"], 1, "`target`"),
        (["--num-attention-heads", "7"], 1, "num_attention_heads"),
    ],
)
def test_convert_refuses_other_options(tmp_path, options, code, message):
    runner = CliRunner()
    arguments = ["convert", str(GOLDEN / "official_personvit_reid.pth"), str(tmp_path / "out"), *options]
    result = runner.invoke(app, arguments)
    assert not (tmp_path / "out").exists()
    if code == 2:
        assert result.exit_code == 2 and message in result.output
    else:
        assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_damaged_file_is_one_line_and_leaves_nothing(tmp_path):
    whole = (GOLDEN / "official_personvit_reid.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    process = personvit("convert", tmp_path / "half.pth", tmp_path / "out")
    assert process.returncode == 1 and process.stderr.startswith("personvit: ") and "half.pth" in process.stderr
    assert len(process.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["half.pth"]
