import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from personvit_hf import PersonViTConfig, PersonViTForReID, PersonViTImageProcessor, cli_show
from personvit_hf.cli import app

DATA = str(Path(__file__).parents[1] / "examples" / "data")
PERSONVIT = Path(sys.executable).with_name("personvit")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    PersonViTForReID(PersonViTConfig(image_size=[64, 32], num_labels=3, **sizes)).save_pretrained(folder)
    PersonViTImageProcessor(size={"height": 64, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    files = [str(folder / name) for name in ("a.jpg", "b.png")]
    for value, file in enumerate(files):
        Image.fromarray(np.random.default_rng(value).integers(0, 256, (50, 20, 3), np.uint8)).save(file)
    return files


def show(*arguments):
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


@pytest.mark.parametrize(
    "arguments",
    [
        ["parts", DATA, "--split", "query", "--rows", "0,1,2", "--groups", "4"],
        ["attention", "{a}", "{b}", "--layer", "0", "--image-size", "96x48"],
        ["matches", "{a}", "{b}", "--top", "5"],
        ["occlusion", "{a}", "--shares", "0,0.5", "--side", "top"],
        ["occlusion", DATA, "--split", "gallery"],
        ["retrieval", DATA, "--num-queries", "2", "--top", "3"],
        ["map", DATA, "--split", "query", "--method", "pca", "--people", "5"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_each_picture_is_written(checkpoint, pictures, tmp_path, arguments):
    a, b = pictures
    out = tmp_path / "new" / "picture.png"
    arguments = [argument.format(a=a, b=b) for argument in arguments]
    result = show(*arguments, "--model", checkpoint, "--out", out, "--dpi", 60)
    assert result.exit_code == 0, result.exception
    with Image.open(out) as picture:
        assert min(picture.size) > 60 and len(np.unique(np.asarray(picture))) > 20
        assert round(picture.info["dpi"][0]) == 60


def test_models_compute_where_accelerate_does(checkpoint, monkeypatch):
    monkeypatch.setattr("accelerate.PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    assert cli_show._load(checkpoint, Path("picture.png"))[0].device.type == "meta"


def test_as_a_user_runs_it(checkpoint, pictures, tmp_path):
    out = tmp_path / "attention.svg"
    command = [PERSONVIT, "show", "attention", pictures[0], "--model", checkpoint, "--out", out]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert out.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["attention", "missing.jpg", "--out", "x.png"], "missing.jpg"),
        (["attention", DATA, "--split", "query", "--rows", "90", "--out", "x.png"], r"\[0, 89\], got 90"),
        (["attention", DATA, "--split", "querry", "--out", "x.png"], "'querry'"),
        (["matches", "{a}", "--out", "x.png"], "Two pictures are matched, got 1"),
        (["matches", "{a}", "{b}", "--top", "0", "--out", "x.png"], "at least 1, got 0"),
        (["matches", "{a}", "{b}", "--top", "-1", "--out", "x.png"], "at least 1, got -1"),
        (["map", DATA, "--people", "0", "--out", "x.png"], "at least 1, got 0"),
        (["occlusion", DATA, "--split", "query", "--rows", "1,2", "--out", "x.png"], "got 2"),
        (["attention", "{a}", "--out", "x.gif"], r"x\.gif: a picture's name must end in"),
        (["parts", "{a}", "--groups", "99", "--out", "x.png"], "from 2 to .* got 99"),
        (["attention", "{a}", "--image-size", "60x30", "--out", "x.png"], "60x30"),
    ],
)
def test_wrong_input_is_told(checkpoint, pictures, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(a=pictures[0], b=pictures[1]) for argument in arguments]
    result = show(*arguments, "--model", checkpoint)
    assert isinstance(result.exception, (ValueError, OSError)), result.output
    assert not list(tmp_path.iterdir())
    with pytest.raises(type(result.exception), match=message):
        raise result.exception


@pytest.mark.parametrize(
    "arguments",
    [["{a}", "--rows", "1"], ["{a}", DATA], ["{a}", "--image-size", "64"], ["{a}", "--image-size", "axb"]],
)
def test_wrong_usage_is_refused(checkpoint, pictures, tmp_path, arguments):
    arguments = [argument.format(a=pictures[0]) for argument in arguments]
    assert show("attention", *arguments, "--model", checkpoint, "--out", tmp_path / "x.png").exit_code == 2
    assert not (tmp_path / "x.png").exists()


def test_a_broken_picture_of_a_data_set_is_named(checkpoint, tmp_path):
    folder = tmp_path / "crops"
    folder.mkdir()
    (folder / "broken.jpg").write_text(json.dumps("no picture"))
    result = show("attention", folder, "--model", checkpoint, "--out", tmp_path / "x.png")
    assert isinstance(result.exception, ValueError) and "broken.jpg" in str(result.exception)
