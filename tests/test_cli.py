import json
import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import datasets
import numpy as np
import pytest
import torch
from golden_fixtures import GOLDEN
from PIL import Image
from pyarrow import Table, parquet
from typer.testing import CliRunner

from personvit_hf import PersonViTConfig, PersonViTForReID, PersonViTImageProcessor, cli
from personvit_hf.cli import app
from personvit_hf.embedding import read_embeddings

DATA = Path(__file__).parents[1] / "examples" / "data"

PERSONVIT = Path(sys.executable).with_name("personvit")


def personvit(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([PERSONVIT, *map(str, arguments)], capture_output=True, text=True)


def test_help_lists_the_commands():
    process = personvit("--help")
    assert process.returncode == 0
    for command in ("convert", "embed", "evaluate", "search"):
        assert command in process.stdout


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


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["embed", "", "--model", "m", "--out", "g"], "embed"),
        (["embed", "images", "--model", "", "--out", "g"], "--model"),
        (["embed", "images", "--model", "m", "--out="], "--out"),
        (["data", "select", "", "--by", "random", "--out", "x.parquet"], "select"),
        (["data", "prepare", "images", "--out", ""], "--out"),
        (["convert", "a.pth", ""], "a.pth"),
        (["search", "--gallery", "g", "--query", ""], "--query"),
    ],
)
def test_empty_paths_are_not_the_current_folder(tmp_path, monkeypatch, arguments, place):
    save_pictures(tmp_path / "images", "a")
    monkeypatch.chdir(tmp_path / "images")
    result = invoke(*arguments)
    assert result.exit_code == 2 and f"after {place} is empty" in re.sub(r"[\s│]+", " ", result.output)
    assert [path.name for path in Path().iterdir()] == ["a.png"]


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
    told = process.stdout.split("for the way back: ")[1].split()
    assert (
        told == "--num-attention-heads 5 --image-size 128x64 --image-mean 0.5,0.5,0.5 --image-std 0.5,0.5,0.5".split()
    )
    process = personvit("convert", tmp_path / "back.pth", tmp_path / "again", *told)
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


# embed, search, evaluate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    PersonViTForReID(PersonViTConfig(**sizes, image_size=[32, 16], patch_size=8, num_labels=4)).save_pretrained(folder)
    PersonViTImageProcessor(size={"height": 32, "width": 16}).save_pretrained(folder)
    return folder


def test_a_gallery_is_embedded_and_searched(checkpoint, tmp_path):
    """The quick one; the slow ones below draw, filter and share the work."""
    save_pictures(tmp_path / "images", "abcd")
    process = personvit(
        *("embed", tmp_path / "images", "--model", checkpoint),
        *("--out", tmp_path / "gallery", "--num-workers", 0),
    )
    assert process.returncode == 0, process.stderr
    assert "1 shards made by process 0 of 1" in process.stdout
    query = tmp_path / "images" / "c.png"
    process = personvit("search", "--gallery", tmp_path / "gallery", "--query", query, "--top", 3)
    assert process.returncode == 0, process.stderr
    title, first, second, third = process.stdout.splitlines()
    assert title == str(query)
    rank, similarity, name = first.split()
    assert (rank, similarity, Path(name).name) == ("1", "1.0000", "c.png")
    assert float(third.split()[1]) <= float(second.split()[1]) <= 1


def save_pictures(folder: Path, names: str) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 20, 3), dtype=np.uint8)).save(folder / f"{name}.png")


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_a_gallery_whose_pictures_were_replaced(checkpoint, tmp_path, monkeypatch):
    save_pictures(tmp_path / "images", "abcd")
    flags = ["--model", checkpoint, "--num-workers", 0, "--shard-images", 2, "--out", tmp_path / "gallery"]
    monkeypatch.chdir(tmp_path)
    assert "2 shards made" in invoke("embed", "images", *flags).output
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert "0 shards made" in invoke("embed", "../images", *flags).output  # the same, spelt otherwise
    search = ["search", "--gallery", tmp_path / "gallery", "--query", tmp_path / "images" / "a.png"]
    assert invoke(*search, "--draw", tmp_path / "found.png").exit_code == 0
    (tmp_path / "images" / "c.png").rename(tmp_path / "images" / "e.png")
    for arguments in (["embed", "../images", *flags], [*search, "--draw", tmp_path / "again.png"]):
        result = invoke(*arguments)
        assert isinstance(result.exception, ValueError)
        assert re.search(r"row 2 was .*c\.png, now .*d\.png", str(result.exception))
    assert not (tmp_path / "again.png").exists()


def test_processes_that_do_not_know_of_each_other_embed_nothing(checkpoint, tmp_path, monkeypatch):
    save_pictures(tmp_path / "images", "a")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke("embed", tmp_path / "images", "--model", checkpoint, "--out", tmp_path / "gallery")
    assert str(result.exception).startswith("2 processes were started, but this one knows of 1")
    assert not (tmp_path / "gallery").exists()


def test_figures_that_could_not_be_written_are_not_computed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("personvit_hf.scripting.score", None)
    result = invoke("evaluate", DATA, "--model", checkpoint, "--output", tmp_path)
    assert isinstance(result.exception, IsADirectoryError)


def test_what_is_told_of_a_foreign_gallery_cannot_steer_the_terminal(checkpoint, tmp_path, monkeypatch, capsys):
    save_pictures(tmp_path / "images", "a")
    invoke("embed", tmp_path / "images", "--model", checkpoint, "--num-workers", 0, "--out", tmp_path / "gallery")
    shard = tmp_path / "gallery" / "shard-00000.parquet"
    parquet.write_table(Table.from_pydict({"row": [0], "name": ["é\x07\r\n   2  1.0000  b.png"]}), shard)
    search = ["search", "--gallery", tmp_path / "gallery", "--query", tmp_path / "images" / "a.png"]
    assert invoke(*search).stdout.splitlines()[1:] == ["   1  1.0000  é\\x07\\r\\n   2  1.0000  b.png"]

    with ZipFile(tmp_path / "odd.zip", "w") as archive:
        archive.writestr("\x1b[31mred\x07.txt", b"")
        archive.write(tmp_path / "images" / "a.png", "a.png")
    told = invoke("data", "prepare", tmp_path / "odd.zip", "--out", tmp_path / "prepared").stdout
    assert "kept 1" in told and "red" in told and told.replace("\n", "").isprintable()

    def fail():
        raise ValueError("gallery of \x1b]0;title\x07\nsecond line")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "personvit: gallery of \\x1b]0;title\\x07\nsecond line\n"


def test_nothing_found_is_told_for_the_right_reason(checkpoint, tmp_path):
    save_pictures(tmp_path / "query", "a")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("no picture")
    flags = ["--model", checkpoint, "--num-workers", 0, "--max-broken-share", 1, "--out", tmp_path / "gallery"]
    invoke("embed", tmp_path / "images", *flags)
    found = invoke("search", "--gallery", tmp_path / "gallery", "--query", tmp_path / "query" / "a.png").output
    assert "the gallery holds no image" in found


@pytest.mark.slow
def test_qdrant_finds_the_same(checkpoint, tmp_path):
    pytest.importorskip("qdrant_client")
    flags = ["--model", checkpoint, "--out", tmp_path / "gallery", "--split", "gallery"]
    assert personvit("embed", DATA, *flags).returncode == 0
    rows = datasets.Dataset.from_parquet(str(next(DATA.glob("gallery*.parquet"))))
    rows = rows.cast_column("image", datasets.Image(decode=False))
    (tmp_path / "query.jpg").write_bytes(rows[17]["image"]["bytes"])
    search = ["search", "--gallery", tmp_path / "gallery", "--query", tmp_path / "query.jpg", "--not-camera", 1]
    exact, qdrant = (personvit(*search, "--index", index) for index in ("exact", "qdrant"))
    assert qdrant.returncode == 0, qdrant.stderr
    assert qdrant.stdout == exact.stdout != ""
    process = personvit(*search, "--index", "qdrant", "--qdrant-url", "http://127.0.0.1:9")
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("personvit: Qdrant at http://127.0.0.1:9")
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_embed_search_and_draw(checkpoint, tmp_path):
    settings = ["--model", checkpoint, "--out", tmp_path / "gallery", "--split", "gallery", "--shard-images", 60]
    process = personvit("embed", DATA, *settings)
    assert process.returncode == 0, process.stderr
    assert "3 shards made" in process.stdout
    assert "0 shards made" in personvit("embed", DATA, *settings).stdout
    folder = read_embeddings(tmp_path / "gallery")

    rows = datasets.Dataset.from_parquet(str(next(DATA.glob("gallery*.parquet"))))
    rows = rows.cast_column("image", datasets.Image(decode=False))
    (tmp_path / "query.jpg").write_bytes(rows[17]["image"]["bytes"])
    search = ["search", "--gallery", tmp_path / "gallery", "--query", tmp_path / "query.jpg", "--top", 4]
    process = personvit(*search, "--draw", tmp_path / "found.png")
    assert process.returncode == 0, process.stderr
    title, first, *others = process.stdout.splitlines()
    assert title.endswith("query.jpg") and len(others) == 3
    assert first.split()[:3] == ["1", "1.0000", folder.names[17]]
    assert f"camera_id {folder.columns['camera_id'][17]}" in first
    assert Image.open(tmp_path / "found.png").size[1] > 100

    elsewhere = personvit(*search, "--not-camera", folder.columns["camera_id"][17])
    assert folder.names[17] not in elsewhere.stdout and len(elsewhere.stdout.splitlines()) == 5
    assert "no column `track_id`" in personvit(*search, "--track", 1).stderr


@pytest.mark.slow
def test_a_gallery_of_another_model_is_refused(checkpoint, tmp_path):
    other = tmp_path / "other"
    model = PersonViTForReID.from_pretrained(checkpoint)
    torch.nn.init.zeros_(model.personvit.embeddings.cls_token)
    model.save_pretrained(other)
    PersonViTImageProcessor(size={"height": 32, "width": 16}).save_pretrained(other)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 40)).save(tmp_path / "images" / "a.png")
    personvit("embed", tmp_path / "images", "--model", checkpoint, "--out", tmp_path / "gallery")
    query = ["--gallery", tmp_path / "gallery", "--query", tmp_path / "images" / "a.png"]
    assert personvit("search", *query).returncode == 0
    process = personvit("search", *query, "--model", other)
    assert process.returncode == 1 and "another model or revision" in process.stderr


def shard_count(line: str) -> int:
    return int(line.rpartition(": ")[2].split()[0])


@pytest.mark.slow
def test_two_processes_embed_as_one(checkpoint, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, command in (("two", launch), ("one", [sys.executable])):
        flags = ["--model", checkpoint, "--out", tmp_path / name, "--split", "query", "--shard-images", 20]
        command = [*command, PERSONVIT, "embed", DATA, *flags]
        process = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        shares = [line for line in process.stdout.splitlines() if "shards made" in line]
        expected = {"two": ["2 shards made by process 1 of 2", "3 shards made by process 0 of 2"], "one": ["5 shards"]}
        assert len(shares) == len(expected[name])
        assert all(text in line for text, line in zip(expected[name], sorted(shares, key=shard_count), strict=True))
    one, two = (read_embeddings(tmp_path / name) for name in ("one", "two"))
    assert (one.embeddings == two.embeddings).all() and one.names == two.names


@pytest.mark.slow
def test_evaluate(checkpoint, tmp_path):
    process = personvit("evaluate", DATA, "--model", checkpoint, "--bootstrap", 50, "--output", tmp_path / "f.json")
    assert process.returncode == 0, process.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    low, high = figures["confidence_intervals"]["mAP"]
    assert low <= figures["mAP"] <= high
    assert f"mAP {100 * figures['mAP']:6.2f}  [{100 * low:.2f}, {100 * high:.2f}]" in process.stdout
    assert "occlusion 0: mAP" in process.stdout
    options = ["--rerank", "--expand", 3, "--remove-camera-bias", "--camera-pairs"]
    process = personvit("evaluate", DATA, "--model", checkpoint, *options)
    assert process.returncode == 0, process.stderr
    assert "cameras 0 -> 1: mAP" in process.stdout
    assert f"mAP {100 * figures['mAP']:6.2f}" not in process.stdout


def test_the_app_needs_a_model_and_a_gallery(tmp_path):
    process = personvit("app", "--model", tmp_path / "none", "--gallery", DATA)
    assert process.returncode == 1
    assert process.stderr.startswith("personvit: ") and "Traceback" not in process.stderr
    assert "--gallery" in personvit("app", "--model", tmp_path).stderr
