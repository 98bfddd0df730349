import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pytest
from hub_server import Repo, running_hub
from layouts import jpegs, picture, to_archive, to_folder

from personvit_hf.preparing import prepare_dataset
from personvit_hf.shards import load_person_stream

NUM_IMAGES = 23
pytestmark = pytest.mark.usefixtures("own_cache")


def webdataset(folder: Path, num_images: int = NUM_IMAGES, per_file: int = 10, name: str = "part") -> Path:
    """Tar files with a .jpg and a .json a sample."""
    for file, start in enumerate(range(0, num_images, per_file)):
        files = {}
        for index in reversed(range(start, min(start + per_file, num_images))):  # `to_archive` turns it round
            files[f"{index:06}.json"] = json.dumps({"index": index}).encode()
            files[f"{index:06}.jpg"] = picture(index)
        to_archive(folder / f"{name}-{file:05}.tar", files)
    return folder


def parquet(folder: Path, num_images: int = NUM_IMAGES, per_file: int = 10, per_group: int = 4) -> Path:
    names = [f"{index:06}.jpg" for index in range(num_images)]
    features = datasets.Features({"image": datasets.Image()})
    folder.mkdir(parents=True, exist_ok=True)
    for file, start in enumerate(range(0, num_images, per_file)):
        rows = [
            {"image": {"bytes": picture(start + i), "path": name}}
            for i, name in enumerate(names[start : start + per_file])
        ]
        table = datasets.Dataset.from_list(rows, features)
        table.to_parquet(folder / f"train-{file:05}.parquet", batch_size=per_group)
    return folder


def contents(images):
    return [row["bytes"] for piece in images.pieces for row in images.read(piece, 0, piece.num_rows)]


@pytest.mark.parametrize("make", [webdataset, parquet])
def test_every_row_in_order(tmp_path, make):
    images = load_person_stream(make(tmp_path / "in"))
    assert len(images) == NUM_IMAGES and len(images.files) == 3
    assert contents(images) == [picture(index) for index in range(NUM_IMAGES)]
    assert [piece.first_row for piece in images.pieces] == (
        [0, 10, 20] if make is webdataset else [0, 4, 8, 10, 14, 18, 20]
    )


@pytest.mark.parametrize("change_at", [2, 7, 10])
def test_tar_files_of_several_kinds_of_images(tmp_path, change_at):
    """Within the samples that `datasets` takes the columns from, after them, and from one file to the next."""
    names = [f"{index:03}.{'jpg' if index < change_at else 'PNG'}" for index in range(14)]
    files = jpegs(names) | {"014.json": b"{}"}  # the last sample has no image
    for number, part in enumerate((names[:10], names[10:], ["014.json"])):
        to_archive(tmp_path / "in" / f"{number}.tar", {name: files[name] for name in reversed(part)})
    images = load_person_stream(tmp_path / "in")
    rows = [row for piece in images.pieces for row in images.read(piece, 0, piece.num_rows)]
    assert [row["bytes"] for row in rows[:14]] == [picture(index) for index in range(14)] and rows[14] is None
    assert [row["path"][-3:] for row in rows[:14]] == ["jpg"] * change_at + ["PNG"] * (14 - change_at)
    part = images.read(images.pieces[0], 6, 9)
    assert [row["bytes"] for row in part] == [picture(index) for index in (6, 7, 8)]


@pytest.mark.parametrize("names", [["1.jpg", "1.png"], [f"{i}.jpg" for i in range(1, 8)] + ["8.png", "8.jpg"]])
def test_tar_sample_of_several_images(tmp_path, names):
    to_archive(tmp_path / "a.tar", dict(reversed(jpegs(names).items())))
    with pytest.raises(ValueError, match=r"a\.tar.*several images: [18]\.jpg, [18]\.png"):
        load_person_stream(tmp_path / "a.tar")


def test_tar_files_without_images(tmp_path):
    to_archive(tmp_path / "a.tar", jpegs(["1.c1.jpg", "2.c1.jpg"]))
    with pytest.raises(ValueError, match=r"a\.tar: no image in its first 2 samples; .*\.jpg, .*no other dot"):
        load_person_stream(tmp_path / "a.tar")


@pytest.mark.parametrize("make", [webdataset, parquet])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 3), (2, 2), (3, 4)])
def test_part_of_a_piece(tmp_path, make, start, stop):
    images = load_person_stream(make(tmp_path / "in"))
    piece = images.pieces[1]
    found = [row["bytes"] for row in images.read(piece, start, stop)]
    assert found == [picture(piece.first_row + index) for index in range(start, stop)]


def test_releases_of_datasets_that_cannot_part_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.IterableDataset, "reshard", lambda self: self)
    images = load_person_stream(parquet(tmp_path / "in"))
    assert contents(images) == [picture(index) for index in range(NUM_IMAGES)]


def test_prepared_folder_and_single_files(tmp_path):
    prepare_dataset(
        to_folder(tmp_path / "in", jpegs(f"{i:02}.jpg" for i in range(9))), tmp_path / "out", shard_images=4
    )
    assert contents(load_person_stream(tmp_path / "out")) == [picture(index) for index in range(9)]
    assert len(load_person_stream(tmp_path / "out" / "train-00002-of-00003.parquet")) == 1
    webdataset(tmp_path / "tars")
    assert len(load_person_stream(tmp_path / "tars" / "part-00002.tar")) == 3
    assert len(load_person_stream(f"file://{tmp_path}/tars/part-{{00000..00001}}.tar")) == 20


def test_sizes_json_saves_the_counting(tmp_path):
    folder = webdataset(tmp_path / "in")
    (folder / "sizes.json").write_text(json.dumps({"part-00000.tar": 7, "part-00001.tar": 10, "other": "x"}))
    images = load_person_stream(folder)
    assert [piece.num_rows for piece in images.pieces] == [7, 10, 3]
    (folder / "sizes.json").write_text(json.dumps({"part-00000.tar": 11}))
    images = load_person_stream(folder)
    with pytest.raises(ValueError, match="part-00000.tar: has fewer rows.*sizes.json"):
        list(images.read(images.pieces[0], 0, 11))


@pytest.mark.parametrize(
    "told", ["[1]", '[["part-00000.tar", 7]]', "3", "null", '{"part-00000.tar": true}', "[" * 5000]
)
def test_sizes_json_that_tells_nothing(tmp_path, told):
    folder = webdataset(tmp_path / "in")
    (folder / "sizes.json").write_text(told)
    assert [piece.num_rows for piece in load_person_stream(folder).pieces] == [10, 10, 3]


@pytest.mark.parametrize("make", [webdataset, parquet])
@pytest.mark.parametrize("name", ["in[1]", "in*"])
def test_folder_name_is_no_pattern(tmp_path, make, name):
    make(tmp_path / "in1", num_images=4)
    images = load_person_stream(make(tmp_path / name))
    assert contents(images) == [picture(index) for index in range(NUM_IMAGES)]
    file = Path(images.files[0])
    assert file.parent == tmp_path / name and len(load_person_stream(file)) == 10


@pytest.mark.parametrize("make", [webdataset, parquet])
def test_path_with_two_colons_is_refused_by_name(tmp_path, make):
    with pytest.raises((ValueError, FileNotFoundError), match="x::y.*rename"):
        load_person_stream(make(tmp_path / "x").rename(tmp_path / "x::y"))


def test_readme_that_is_no_yaml(tmp_path):
    (parquet(tmp_path / "in") / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises((ValueError, FileNotFoundError), match="README.md.*can't be read"):
        load_person_stream(tmp_path / "in")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no parquet and no tar file"),
        ({"a.jpg": picture()}, "no parquet and no tar file.*data prepare"),
        ({"train.parquet": b""}, "train.parquet"),
        ({"train.parquet": b"PAR1" + bytes(100) + b"PAR1"}, "train.parquet"),
        ({"a.tar": b"no tar"}, "a.tar|no shards there"),
        ({"a.tar": b""}, "a.tar|no shards there|no rows"),
    ],
    ids=["empty", "images", "empty parquet", "no parquet", "no tar", "empty tar"],
)
def test_bad_folder(tmp_path, files, message):
    to_folder(tmp_path / "in", files)
    (tmp_path / "in").mkdir(exist_ok=True)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_person_stream(tmp_path / "in")


def test_bad_address_and_columns(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_person_stream(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"must end in .parquet or .tar"):
        load_person_stream("https://host/part-{000..003}.zip")
    with pytest.raises(ValueError, match="holds no number"):
        load_person_stream("https://host/part-{003..000}.tar")
    with pytest.raises(FileNotFoundError, match="no shards there"):
        load_person_stream(f"file://{tmp_path}/part-{{000..003}}.tar")
    (tmp_path / "x").mkdir()
    datasets.Dataset.from_dict({"id": [1]}).to_parquet(tmp_path / "x" / "a.parquet")
    with pytest.raises(ValueError, match="no column `image`.*found id"):
        load_person_stream(tmp_path / "x")
    datasets.Dataset.from_dict({"image": ["a.jpg"]}).to_parquet(tmp_path / "x" / "a.parquet")
    with pytest.raises(ValueError, match="column `image` holds.*not images"):
        load_person_stream(tmp_path / "x")


@pytest.mark.parametrize("make", [webdataset, parquet])
def test_shard_cut_off_after_counting(tmp_path, make):
    images = load_person_stream(make(tmp_path / "in"))
    shard = Path(images.files[1])
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])
    with pytest.raises(ValueError, match=f"{shard.name}: (this shard can't be read|has fewer rows)"):
        contents(images)


def test_over_the_hub_and_over_http(tmp_path):
    """The real clients, in a process of their own: they read their addresses when they are imported."""
    tree = {path.name: path.read_bytes() for path in [*parquet(tmp_path / "p").iterdir()]}
    tars = {path.name: path.read_bytes() for path in [*webdataset(tmp_path / "t").iterdir()]}
    code = """
import sys, warnings
from personvit_hf.shards import load_person_stream
from layouts import picture
expected = [picture(index) for index in range(23)]
for name in sys.argv[1:]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        images = load_person_stream(name)
    assert len(images.files) == 3, images.files
    found = [row["bytes"] for piece in images.pieces for row in images.read(piece, 0, piece.num_rows)]
    assert found == expected, name
    print(name, len(images.pieces), [str(warning.message) for warning in told])
try:
    load_person_stream(sys.argv[1] + "x")
except FileNotFoundError as error:
    print("refused", error)
"""
    with running_hub() as hub:
        hub.repos["datasets/alice/crops"] = Repo(private=False, commits=[tree])
        hub.repos["datasets/alice/tars"] = Repo(private=False, commits=[tars])
        names = [
            "alice/crops",
            "hf://datasets/alice/crops/train-*.parquet",
            f"{hub.url}/datasets/alice/crops/resolve/main/train-{{00000..00002}}.parquet",
            "alice/tars",
            f"{hub.url}/datasets/alice/tars/resolve/main/part-{{00000..00002}}.tar",
        ]
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }
        process = subprocess.run(
            [sys.executable, "-c", code, *names], capture_output=True, text=True, env=environment, timeout=120
        )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = process.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [[name, "7" if "crops" in name else "3"] for name in names]
    assert ["3 tar files are read to count" in line for line in lines[:5]] == [False, False, False, True, True]
    assert lines[5].startswith("refused alice/cropsx")


@pytest.mark.parametrize("kind", ["sparse", "large"])
@pytest.mark.parametrize("told", [False, True])
def test_tars_that_would_fill_the_memory(tmp_path, kind, told):
    """A member of 4 GiB in a file of a few kilobytes; with sizes.json, nothing is read before the shard itself."""
    folder = webdataset(tmp_path, 70, 10)
    member = tarfile.TarInfo("999999.jpg")
    if kind == "sparse":
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**32)}
        content = f"1\n{2**32}\n0\n".encode().ljust(512, b"\0")
    else:
        member.size, content = 2**32, b""
    last = folder / "part-00006.tar"
    member.size = member.size or len(content)
    last.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + content + last.read_bytes())
    if told:
        (folder / "sizes.json").write_text(json.dumps({file.name: 10 for file in folder.glob("*.tar")}))
    with pytest.raises(ValueError, match="part-00006.tar.*999999.jpg: (file too large|no regular file)"):
        contents(load_person_stream(folder))
