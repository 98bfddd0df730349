import io
import logging
import os
import pickle
import tarfile
import warnings
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from personvit_hf.person_images import (
    BrokenImage,
    BrokenImageBudget,
    PersonImages,
    decode_image,
    load_person_images,
    split_broken,
)

DEMO = Path(__file__).parents[1] / "examples" / "data"
pytestmark = pytest.mark.usefixtures("own_cache")


def picture(mode="RGB", size=(3, 5), format="PNG", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, format, **options)
    return content.getvalue()


def paths(rows):
    return [image["path"] for image in rows["image"]]


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name in ("b/2.png", "b/10.JPG", "a/deep/3.webp", "c.bmp", "d.jpeg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(format="JPEG"))
    for name in ("notes.txt", "b/._2.png", ".hidden.png"):
        (root / name).write_bytes(b"?")
    return root


def test_folder_tree(tree):
    rows = load_person_images(tree)
    assert [os.path.relpath(path, tree) for path in paths(rows)] == [
        "a/deep/3.webp", "b/10.JPG", "b/2.png", "c.bmp", "d.jpeg"
    ]  # fmt: skip
    assert rows.column_names == ["image"]
    assert rows.features["image"] == datasets.Image(decode=False)
    assert rows[0]["image"]["bytes"] is None
    assert PersonImages(rows)[0].shape == (5, 3, 3)


def test_links_are_followed_once(tree, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "far.png").write_bytes(picture())
    (tree / "linked").symlink_to(other)
    (tree / "loop").symlink_to(tree)
    (tree / "file.png").symlink_to(other / "far.png")
    names = [os.path.relpath(path, tree) for path in paths(load_person_images(tree))]
    assert len(names) == len(set(names)) == 7
    assert {"linked/far.png", "file.png"} <= set(names)


def test_a_folder_is_listed_without_a_look_at_each_image(tree, monkeypatch):
    names = paths(load_person_images(tree))
    for index in range(200):
        (tree / f"{index:03}.jpg").write_bytes(b"")
    looked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: (looked.append(path), stat(path, **options))[1])
    assert paths(load_person_images(tree)) == sorted([*names, *(f"{tree}/{index:03}.jpg" for index in range(200))])
    assert len([path for path in looked if str(path).endswith(".jpg")]) < 10


def lmdb_at(path, **options):
    lmdb = pytest.importorskip("lmdb")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=2**20, **options) as database, database.begin(write=True) as transaction:
        transaction.put(path.name.encode(), picture())


def test_forms_of_lmdb_in_a_folder(tmp_path):
    for name in ("plain", "named.lmdb", "deep/er"):
        lmdb_at(tmp_path / name)  # folders, with lock.mdb
    for name in ("one.mdb", "two.LMDB", "deep/three.lmdb"):
        lmdb_at(tmp_path / name, subdir=False)
    (tmp_path / "no.mdb").mkdir()
    (tmp_path / "gone.mdb").symlink_to("nowhere")
    found = paths(load_person_images(tmp_path))
    assert [path.removesuffix(f"::{tmp_path}{path.rpartition(str(tmp_path))[2]}") for path in found] == [
        f"lmdb://{name}" for name in ("er", "three.lmdb", "named.lmdb", "one.mdb", "plain", "two.LMDB")
    ]
    assert all(decode_image(path).shape == (5, 3, 3) for path in found)
    (tmp_path / "loose.png").write_bytes(picture())
    with pytest.raises(ValueError, match=r"archives \(er\) beside loose images \(loose.png\)"):
        load_person_images(tmp_path)


def parquet(path, config_rows=3):
    images = [{"bytes": picture(size=(3, 5 + index)), "path": f"{index}.png"} for index in range(config_rows)]
    features = datasets.Features({"image": datasets.Image(), "frame": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": images, "frame": range(config_rows)}, features).to_parquet(path)


@pytest.mark.parametrize("whole_folder", [True, False])
def test_parquet(tmp_path, whole_folder):
    root = tmp_path / "shards"
    root.mkdir()
    parquet(root / "train-0.parquet")
    rows = load_person_images(root if whole_folder else str(root / "train-0.parquet"))
    assert rows.column_names == ["image"]
    assert [image.shape for image in PersonImages(rows)] == [(5, 3, 3), (6, 3, 3), (7, 3, 3)]
    assert rows[0]["image"]["bytes"] == picture(size=(3, 5))


@pytest.mark.parametrize("name", ["data[1]", "data*", "data?"])
def test_folder_name_is_no_pattern(tmp_path, name):
    for folder, num_rows in ((name, 2), ("data1", 5)):
        (tmp_path / folder / "sub").mkdir(parents=True)
        parquet(tmp_path / folder / "train-0.parquet", num_rows)
        (tmp_path / folder / "notes.txt").write_text("?")
    (tmp_path / "link").symlink_to(tmp_path / name)
    for source in (tmp_path / name, tmp_path / name / "train-0.parquet", tmp_path / "link"):
        assert len(load_person_images(source)) == 2
    parquet(tmp_path / name / "sub" / "crops-[0].parquet", 3)
    (tmp_path / name / "README.md").write_text(
        "---\nconfigs:\n- config_name: labelled\n  default: true\n  data_files: train-0.parquet\n"
        "- config_name: unlabelled\n  data_files: sub/crops-*.parquet\n---\n"
    )
    assert len(load_person_images(tmp_path / name)) == 3
    text = (tmp_path / name / "README.md").read_text()
    (tmp_path / name / "README.md").write_text(text.replace("unlabelled", "other"))
    assert len(load_person_images(tmp_path / name)) == 2
    (tmp_path / name / "README.md").write_text(text.replace("unlabelled", "other").replace("  default: true\n", ""))
    with pytest.raises(ValueError, match="none of its configs is the default: labelled, other"):
        load_person_images(tmp_path / name)


def test_parquet_beside_loose_images_is_refused(tree, tmp_path):
    parquet(tree / "pq" / "train.parquet")
    with pytest.raises(ValueError, match=r"tree: parquet files \(pq/train\.parquet\) beside loose images \("):
        load_person_images(tree)
    assert len(load_person_images(tree / "pq")) == 3
    # a copy of a data set whose card has pictures
    (tree / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: pq/*.parquet\n---\n")
    assert len(load_person_images(tree)) == 3


def test_embeddings_beside_images_are_passed_over(tree):
    num_images = len(load_person_images(tree))
    parquet(tree / "emb" / "shard-00000.parquet")
    (tree / "emb" / "embeddings.json").write_text("{}")
    assert len(load_person_images(tree)) == num_images
    with pytest.raises(ValueError, match="emb: no image in it"):
        load_person_images(tree / "emb")


def test_parquet_at_a_path_with_two_colons_is_refused_by_name(tmp_path):
    (tmp_path / "x").mkdir()
    parquet(tmp_path / "x" / "train.parquet")
    (tmp_path / "x").rename(tmp_path / "x::y")
    for source in (tmp_path / "x::y", tmp_path / "x::y" / "train.parquet"):
        with pytest.raises(ValueError, match="x::y.*rename"):
            load_person_images(source)


@pytest.mark.parametrize(
    "readme",
    ["configs: [", "configs: {a: 1}", "dataset_info: [1]", "configs:\n- {config_name: a, data_files: 5}"],
)
def test_readme_that_describes_nothing(tmp_path, readme):
    parquet(tmp_path / "train.parquet")
    (tmp_path / "README.md").write_text(f"---\n{readme}\n---\n")
    with pytest.raises(ValueError, match=f"{tmp_path}.*can't be read"):
        load_person_images(tmp_path)


def test_unlabelled_config(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    parquet(root / "train.parquet", 1)
    parquet(root / "crops.parquet", 4)
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: labelled\n  default: true\n  data_files: train.parquet\n"
        "- config_name: unlabelled\n  data_files: crops.parquet\n---\n"
    )
    assert len(load_person_images(root)) == 4


def test_demo_data():
    rows = load_person_images(DEMO)
    assert len(rows) >= 300
    images = PersonImages(rows)
    assert all(images[index].dtype == np.uint8 for index in range(0, len(images), 50))
    assert sum(file.stat().st_size for file in DEMO.rglob("*")) <= 6e6


@pytest.mark.parametrize("name", ["./missing", "/missing", "missing", "missing/deep/er"])
def test_missing_path(name):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file or folder"):
        load_person_images(name)


def test_an_empty_path_is_not_the_current_folder(tree, monkeypatch):
    monkeypatch.chdir(tree)
    with pytest.raises(FileNotFoundError, match="An empty path.*variable"):
        load_person_images("")
    with pytest.raises(FileNotFoundError, match="An empty path"):
        load_person_images("luperson", root="")


def test_nothing_usable(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=f"{tmp_path}: no image"):
        load_person_images(tmp_path)
    with pytest.raises(ValueError, match="notes.txt: expected a folder"):
        load_person_images(tmp_path / "notes.txt")
    datasets.Dataset.from_dict({"picture": [1]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no column `image`; found picture"):
        load_person_images(tmp_path / "train.parquet")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="train.parquet.*can't be read"):
        load_person_images(tmp_path / "train.parquet")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_decode_modes(mode):
    content = picture(mode)
    image = decode_image(content)
    assert (image.shape, image.dtype, image.flags.writeable) == ((5, 3, 3), np.uint8, True)
    np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_decode_sources(tmp_path):
    content = picture()
    (tmp_path / "a.png").write_bytes(content)
    expected = decode_image(content)
    for source in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        {"bytes": content, "path": "gone.png"},
        {"bytes": None, "path": str(tmp_path / "a.png")},
    ):
        np.testing.assert_array_equal(decode_image(source), expected)


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("a: &a [x]\nb: [*a, *a]", "line 2: the alias .a"),
        ("configs:\n- config_name: a\n  data_files: ../other/*.parquet", "../other/.* lies outside"),
        (
            "configs:\n- config_name: a\n  data_files:\n  - split: train\n    path: [/other/a.parquet]",
            "/other/a.* outside",
        ),
        ("configs:\n- config_name: a\n  data_files: zip://a.parquet::/other/a.zip", "/other/a.* outside"),
        ("configs:\n- config_name: a\n  data_dir: ../other", "../other lies outside"),
    ],
)
def test_readmes_that_lead_astray(tmp_path, readme, found):
    images = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict({"image": [picture()]}, images).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text(f"---\n{readme}\n---\n")
    with pytest.raises(ValueError, match=f"{tmp_path}: can.t be read: .*{found}"):
        load_person_images(tmp_path)


def test_rows_of_paths_name_files_of_the_data_set_alone(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for folder in (root, tmp_path):
        (folder / "a.png").write_bytes(picture())
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})

    def write(path):
        rows = {"image": [{"bytes": picture(), "path": "/x.png"}, {"bytes": None, "path": path}]}
        datasets.Dataset.from_dict(rows, features).to_parquet(root / "train.parquet")
        return root / "train.parquet"

    for path in (str(tmp_path / "a.png"), str(root / ".." / "a.png"), f"zip://a.png::{tmp_path}/a.zip", "../a.png"):
        with pytest.raises(ValueError, match="a row has no image but the path .*outside the data set"):
            load_person_images(write(path))
    (root / "a.png").rename(root / "inner.txt")
    assert isinstance(PersonImages(load_person_images(write(str(root / "inner.txt"))))[1], np.ndarray)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    content = picture(exif=exif)
    np.testing.assert_array_equal(decode_image(content), np.rot90(decode_image(picture()), k=-1))


def claims_to_be_huge():
    """A PNG of a few bytes whose header says 8000 x 8000."""
    header = b"IHDR" + (8000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    end = b"IEND"
    chunks = b"".join(
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in (header, end)
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image of a kind"),
        (b"hello", "not an image of a kind"),
        (b"\xff\xd8\xff\xe0hello", ""),
        (picture(format="JPEG", size=(64, 64))[:-900], "truncated"),
        (picture(format="GIF"), "not an image of a kind.*JPEG, PNG"),
        (claims_to_be_huge(), "8000 x 8000 pixels"),
        ("/missing/file.jpg", "No such file"),
        ({"bytes": None, "path": None}, "no image data"),
    ],
)
def test_broken_images(content, message):
    with pytest.raises(ValueError, match=f"crop 7: .*{message}"):
        decode_image(content, "crop 7")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 400), st.binary(min_size=1, max_size=30), st.sampled_from(["PNG", "JPEG", "BMP", "WEBP"]))
def test_damaged_bytes_are_an_image_or_a_value_error(position, damage, format):
    content = bytearray(picture(format=format))
    content[position : position + len(damage)] = damage
    try:
        image = decode_image(bytes(content))
    except ValueError:
        return
    assert image.ndim == 3 and image.dtype == np.uint8


@pytest.fixture
def mixed():
    """Ten images of which two are broken."""
    contents = [picture(format="JPEG") for _ in range(10)]
    contents[3] = b"broken"
    contents[8] = None
    images = [
        {"bytes": content, "path": None if index == 3 else f"{index}.jpg"} for index, content in enumerate(contents)
    ]
    features = datasets.Features({"image": datasets.Image(), "person_id": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "person_id": range(10)}, features)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_keeps_the_good_ones(mixed, workers):
    images = PersonImages(mixed)
    loader = torch.utils.data.DataLoader(images, batch_size=5, num_workers=workers, collate_fn=split_broken)
    batches = list(loader)
    assert [len(good) for good, _ in batches] == [4, 4]
    assert [broken[0].name for _, broken in batches] == ["row 3", "row 8 (8.jpg)"]
    assert all(broken[0].reason.startswith(broken[0].name) for _, broken in batches)
    np.testing.assert_array_equal(batches[0][0][0], images[0])


def test_item_depends_on_its_index_alone(mixed):
    images = PersonImages(mixed)
    copy = pickle.loads(pickle.dumps(images))
    for index in (9, 3, 0, 9):
        np.testing.assert_array_equal(images[index], copy[np.int64(index)])
    with pytest.raises(IndexError):
        images[10]


def test_empty_row_is_broken():
    rows = datasets.Dataset.from_dict({"image": [None]}, datasets.Features({"image": datasets.Image()}))
    assert PersonImages(rows)[0] == BrokenImage(
        "row 0", "row 0: no image data; expected the bytes or the path of an image."
    )


def broken(*indices):
    return [BrokenImage(f"row {index}", f"row {index}: cut off") for index in indices]


def test_budget_stops_over_the_share():
    budget = BrokenImageBudget(max_broken_share=0.02, min_seen=100)
    budget.count(broken(0, 1), 50)  # 4%, too early to tell
    budget.count([], 50)  # 2% of 100 is within
    with pytest.raises(RuntimeError, match=r"3 of 101 images.*0\.02(.|\n)*row 1: cut off\nrow 2: cut off"):
        budget.count(broken(2), 1)


def test_budget_at_the_end_of_an_epoch():
    budget = BrokenImageBudget(max_broken_share=0.1, min_seen=1000)
    budget.count(broken(0), 10)
    assert budget.end_epoch() == 1
    budget.count(broken(0), 9)
    with pytest.raises(RuntimeError, match="1 of 9"):
        budget.end_epoch()


def test_budget_reports_each_image_once(caplog):
    caplog.set_level(logging.WARNING)
    budget = BrokenImageBudget(max_broken_share=1.0)
    for _ in range(3):
        budget.count(broken(5), 10)
    assert caplog.text.count("row 5: cut off") == 1
    assert budget.end_epoch() == 3
    assert "3 of 30 images were broken" in caplog.text


def test_names_steer_no_terminal(caplog, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        budget = BrokenImageBudget()
        budget.count([BrokenImage("a\x1b[2J", "a\x1b[2J: cut off")], 1)
        budget.end_epoch()
    assert "\x1b" not in caplog.text + str(caught.value) and r"a\x1b[2J: cut off" in caplog.text
    odd = tmp_path / "a\x1b[2J.jpg"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        (tmp_path / "good.jpg").write_bytes(picture())
        archive.add(tmp_path / "good.jpg", "good.jpg")
        archive.add(tmp_path / "good.jpg", odd.name)
    with pytest.warns(UserWarning, match="unsafe name") as told:
        load_person_images(tmp_path / "a.tar")
    assert "\x1b" not in str(told[0].message)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_budget_share_out_of_range(share):
    with pytest.raises(ValueError, match="max_broken_share"):
        BrokenImageBudget(max_broken_share=share)


def test_split_broken_keeps_the_order():
    bad = broken(1, 2)
    assert split_broken(["a", bad[0], (1, 2), bad[1], "b"]) == (["a", (1, 2), "b"], bad)


@pytest.mark.parametrize(
    ("part", "found"),
    [(b"\xff\xda\0\x08\1\1\0\0\x3f\0", "scans"), (b"\xff\xe1\0\x0aExif\0\0\0\0", "blocks of EXIF")],
)
def test_jpegs_that_would_keep_a_decoder_busy(part, found):
    content = picture(format="JPEG")
    with pytest.raises(ValueError, match=f"image: a JPEG of [0-9]+ {found}"):
        decode_image(content[:2] + 1000 * part + content[2:])
    assert decode_image(picture(format="JPEG", progressive=True)).shape == (5, 3, 3)


def test_wide_bmps_with_run_lengths():
    header = np.array([40, 2**24, 1, 1 | 8 << 16, 1, 6, 0, 0, 256, 0], "<u4").tobytes()
    content = b"BM" + np.array([1092 - 8, 0, 1078], "<u4").tobytes() + header + bytes(1024) + b"\0\2\0\xff\0\1"
    with pytest.raises(ValueError, match="image: a BMP with run lengths, 16777216 pixels wide"):
        decode_image(content)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_large_or_corrupt_exif_is_left_alone(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    assert decode_image(picture(format=format, exif=block)).shape == (3, 5, 3)
    if format != "JPEG":  # whose segments hold less
        assert decode_image(picture(format=format, exif=block + bytes(2**16))).shape == (5, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corrupt = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\xff\xff\xff\0\xff\xff\0\0"
        assert decode_image(picture(format=format, exif=corrupt)).shape == (5, 3, 3)


def test_odd_exif_costs_no_picture():
    upright = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        exif[0x010F] = "maker"
        content = io.BytesIO()
        Image.fromarray(upright).save(content, "PNG", exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content.getvalue()))))
        assert np.array_equal(decode_image(content.getvalue()), expected)
    exif[0x0112] = 6
    block = exif.tobytes()
    place = block.index(bytes([0x01, 0x0F, 0x00, 0x02]))  # the maker's entry: its number, then its type
    odd = block[: place + 3] + bytes([11, 0, 0, 0, 1]) + block[place + 8 :]  # one float, in place of text
    content = io.BytesIO()
    Image.fromarray(upright).save(content, "JPEG", exif=odd)
    assert decode_image(content.getvalue()).shape == (24, 40, 3)
    content = io.BytesIO()
    Image.fromarray(upright).save(content, "JPEG", exif=b"Exif\0\0nonsense")
    assert decode_image(content.getvalue()).shape == (40, 24, 3)


def test_names_that_are_no_utf8_are_told(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    with open(os.fsencode(tmp_path) + b"/\xe9.png", "wb") as file:
        file.write(picture())
    with pytest.warns(UserWarning, match="passed over 1 x"):
        assert len(load_person_images(tmp_path)) == 1


def test_a_benchmarks_tree_warns_of_its_test_pictures(tmp_path):
    for name in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0001_c1.png").write_bytes(picture())
    with pytest.warns(UserWarning, match=r"test pictures in query and bounding_box_test .* Give .*bounding_box_train"):
        assert len(load_person_images(tmp_path)) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_person_images(tmp_path / "bounding_box_train")) == 1
