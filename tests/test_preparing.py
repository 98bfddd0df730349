import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import datasets
import filelock
import numpy as np
import pyarrow.parquet as pq
import pytest
from layouts import DUKE, MARKET, jpegs, msmt17, picture, to_archive, to_folder
from PIL import Image
from torch.utils.data import DataLoader

from personvit_hf import file_trees
from personvit_hf.person_images import PersonImages, load_person_images, split_broken
from personvit_hf.preparing import prepare_dataset
from personvit_hf.reid_data import load_reid_dataset

PERSONVIT = Path(sys.executable).with_name("personvit")
pytestmark = pytest.mark.usefixtures("own_cache")


def png_chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png_header(width, height, colour=2):
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, colour, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def deep_grey():
    content = io.BytesIO()
    Image.fromarray(np.full((16, 8), 0x8000, np.uint16)).save(content, "PNG")
    return content.getvalue()


def animation(format):
    frames = [Image.new("RGB", (8, 16), colour) for colour in ("red", "blue")]
    content = io.BytesIO()
    frames[0].save(content, format, save_all=True, append_images=frames[1:])
    return content.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(exif=exif)


JPEG, PNG = picture(size=(64, 64)), picture(format="PNG", size=(64, 64))
WEBP, BMP = picture(format="WEBP", size=(64, 64)), picture(format="BMP", size=(64, 64))
DAMAGED = "cut off or damaged"
# name: (content, None if it is kept, else the reason)
ODD_FILES = {
    "plain.jpg": (JPEG, None),
    "cmyk.jpg": (picture(mode="CMYK"), None),
    "grey.jpg": (picture(mode="L"), None),
    "progressive.jpg": (picture(progressive=True), None),
    "turned.jpg": (turned(), None),
    "exif_nonsense.jpg": (picture(exif=b"Exif\0\0" + b"\xff" * 40), None),
    "one_pixel.jpg": (picture(size=(1, 1)), None),
    "wide.jpg": (picture(size=(10000, 1)), None),
    "tall.png": (picture(format="PNG", size=(1, 10000)), None),
    "grey16.png": (deep_grey(), None),
    "alpha.png": (picture(mode="RGBA", format="PNG"), None),
    "grey_alpha.png": (picture(mode="LA", format="PNG"), None),
    "palette.png": (picture(mode="P", format="PNG"), None),
    "bilevel.png": (picture(mode="1", format="PNG"), None),
    "animated.png": (animation("PNG"), None),
    "animated.webp": (animation("WEBP"), None),
    "lossless.webp": (picture(format="WEBP", lossless=True), None),
    "grey.bmp": (picture(mode="L", format="BMP"), None),
    "png_called.jpg": (PNG, None),
    "jpeg_called.png": (JPEG, None),
    "webp_called.bmp": (WEBP, None),
    "UPPER.JPG": (JPEG, None),
    "with spaces and (brackets).jpg": (JPEG, None),
    "人物/女性 01.jpg": (JPEG, None),
    "пешеход.jpg": (JPEG, None),
    "emoji 🚶.png": (PNG, None),
    "quote'\"$;#%.jpg": (JPEG, None),
    "colon::colon.jpg": (JPEG, None),
    "-rf.jpg": (JPEG, None),
    "long" * 50 + ".jpg": (JPEG, None),
    "a/b/c/d/e/f/deep.jpg": (JPEG, None),
    "trailing_bytes.jpg": (JPEG + b"\0" * 500, None),
    "empty.jpg": (b"", "empty file"),
    "empty.png": (b"", "empty file"),
    "one_byte.jpg": (b"\xff", "no image"),
    "text.jpg": (b"hello", "no image"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "no image"),
    "zeros.jpg": (bytes(1000), "no image"),
    "gif_called.jpg": (picture(format="GIF"), "no image"),
    "animated_gif_called.png": (animation("GIF"), "no image"),
    "tiff_called.jpg": (picture(format="TIFF"), "no image"),
    "ppm_called.jpg": (picture(format="PPM"), "no image"),
    "pickle_called.jpg": (b"\x80\x04cos\nsystem\n(S'echo'\ntR.", "no image"),
    "zip_called.jpg": (b"PK\x05\x06" + bytes(18), "no image"),
    "pdf_called.png": (b"%PDF-1.7\n", "no image"),
    "svg_called.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image"),
    "lfs_pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "no image"),
    "cut.jpg": (JPEG[:-900], DAMAGED),
    "cut_header.jpg": (JPEG[:30], "no image or damaged"),
    "cut.png": (PNG[: len(PNG) // 2], DAMAGED),
    "cut_header.png": (PNG[:20], "no image or damaged"),
    "cut.webp": (WEBP[: len(WEBP) // 2], "no image or damaged"),
    "cut.bmp": (BMP[: len(BMP) // 2], DAMAGED),
    "flipped.png": (PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:], DAMAGED),
    "no_pixels.png": (png_header(8, 16) + png_chunk(b"IEND", b""), DAMAGED),
    "zero_size.png": (png_header(0, 0) + png_chunk(b"IEND", b""), "no image or damaged"),
    "huge_claim.png": (png_header(8000, 8000) + png_chunk(b"IEND", b""), "too many pixels"),
    "bomb_claim.png": (png_header(60000, 60000) + png_chunk(b"IEND", b""), "too many pixels"),
    "real.gif": (animation("GIF"), "no image by its name"),
    "notes.txt": (b"notes", "no image by its name"),
    "Thumbs.db": (b"\xd0\xcf\x11\xe0", "no image by its name"),
    "raw.tiff": (picture(format="TIFF"), "no image by its name"),
    "no_suffix": (JPEG, "no image by its name"),
    ".hidden.jpg": (JPEG, "hidden file"),
    "._apple_double.jpg": (b"\0\5\x16\7", "hidden file"),
    ".cache/thumbnail.jpg": (JPEG, "hidden file"),
}
SPECIAL_FILES = {
    "dangling_link.jpg": "can't be opened",
    "pipe.jpg": "no regular file",
    "larger_than_the_limit.jpg": "file too large",
    "not_utf8_\\xff.jpg": "name not UTF-8",
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of good and bad files, prepared once."""
    root = tmp_path_factory.mktemp("odd")
    to_folder(root / "in", {name: content for name, (content, _) in ODD_FILES.items()})
    (root / "in" / "dangling_link.jpg").symlink_to(root / "nothing.jpg")
    os.mkfifo(root / "in" / "pipe.jpg")
    with open(root / "in" / "larger_than_the_limit.jpg", "wb") as file:
        file.truncate(file_trees.MAX_FILE_BYTES + 1)
    (root / "in" / os.fsdecode(b"not_utf8_\xff.jpg")).write_bytes(JPEG)
    report = prepare_dataset(root / "in", root / "out", shard_images=16)
    rows = datasets.Dataset.from_parquet(
        sorted(map(str, (root / "out").glob("*.parquet"))), cache_dir=str(root / "cache")
    )
    images = rows.cast_column("image", datasets.Image(decode=False))["image"]
    return report, {image["path"]: image["bytes"] for image in images}


@pytest.mark.parametrize("name", ODD_FILES)
def test_odd_file_is_kept_byte_by_byte_or_named(odd, name):
    report, kept = odd
    content, reason = ODD_FILES[name]
    if reason is None:
        assert kept[name] == content
    else:
        assert name not in kept
        found = [why for why, names in report.skipped.items() if name in names]
        assert found == [reason] or (reason == "no image or damaged" and found in (["no image"], [DAMAGED]))


@pytest.mark.parametrize("name", SPECIAL_FILES)
def test_special_file_is_named(odd, name):
    report, kept = odd
    assert name not in kept
    assert [why for why, names in report.skipped.items() if name in names] == [SPECIAL_FILES[name]]


def test_nothing_is_lost(odd):
    report, kept = odd
    assert report.read == len(ODD_FILES) + len(SPECIAL_FILES) == len(kept) + sum(map(len, report.skipped.values()))
    assert len([1 for _, reason in ODD_FILES.values() if reason]) + len(SPECIAL_FILES) >= 35
    assert f"read {report.read}, kept {len(kept)}, skipped" in str(report)


def test_command_and_load_dataset(tmp_path):
    to_archive(tmp_path / "in" / "DukeMTMC-reID.zip", jpegs(DUKE, "DukeMTMC-reID/"))
    out = tmp_path / "out"
    command = [PERSONVIT, "data", "prepare", "dukemtmc-reid", "--root", tmp_path / "in", "--out", out]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "read 4, kept 4, skipped 0" in process.stdout
    assert "published are 16522" in process.stderr
    data = load_reid_dataset(out)
    assert [rows["person_id"][:] for rows in data.values()] == [[1], [5], [3, 5]]
    plain = datasets.load_dataset(str(out))["gallery"].cast_column("image", datasets.Image(decode=False))
    assert plain[1]["image"]["bytes"] == jpegs(DUKE)[DUKE[2]]
    assert json.loads((out / "report.json").read_text())["kept"] == {"train": 1, "query": 1, "gallery": 2}


@pytest.mark.parametrize("name", ["Market-1501-v15.09.15", "./market1501", "market1501/", "Duke"])
def test_benchmark_folder_beside_us(tmp_path, monkeypatch, name):
    """A path that is there is that folder, though a benchmark is called so, too."""
    to_folder(tmp_path / name, jpegs(MARKET))
    monkeypatch.chdir(tmp_path)
    assert prepare_dataset(name, "out").kept == {"train": 2, "query": 1, "gallery": 3}
    with pytest.warns(UserWarning, match="is not complete"):
        assert prepare_dataset(name, "by_root", ".").kept == {"train": 2, "query": 1, "gallery": 3}


def test_unknown_name_with_root(small, tmp_path):
    with pytest.raises(ValueError, match="market1502: no data set.*luperson, market1501, dukemtmc-reid, .*msmt17 for"):
        prepare_dataset("market1502", tmp_path / "out", small)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (jpegs(MARKET, "market1501/"), r"in/b/market1501 is a Market-1501 tree\. Give that path"),
        (msmt17("mask_train_v2", "mask_test_V2"), "in/b is an MSMT17 tree"),
        (jpegs(DUKE[1:], "half/"), "in/b/half is a Market-1501 tree"),
        (
            jpegs(["x/Bounding_Box_Train/0002_c1s1_1.jpg", "x/Query/0001_c1s1_1.jpg"]),
            "in/b/x is a Market-1501 tree",
        ),
    ],
    ids=["market", "msmt17", "half", "capitals"],
)
def test_folder_around_a_labelled_tree_is_refused(tmp_path, files, message):
    to_folder(tmp_path / "in" / "b", files)
    to_folder(tmp_path / "in", jpegs(["z/loose.jpg"]))
    with pytest.raises(ValueError, match=message):
        prepare_dataset(tmp_path / "in", tmp_path / "out")


def test_folder_around_a_labelled_archive_is_refused(tmp_path):
    to_archive(tmp_path / "in" / "m.zip", jpegs(MARKET, "Market/"))
    with pytest.raises(ValueError, match=r"in/m\.zip is a Market-1501 tree"):
        prepare_dataset(tmp_path / "in", tmp_path / "out")


def test_folders_called_as_in_a_labelled_tree(tmp_path):
    names = ("a/query/1.jpg", "b/train/2.jpg", "b/test/3.jpg", f"market/{MARKET[0]}", f"duke/{DUKE[0]}")
    assert prepare_dataset(to_folder(tmp_path / "in", jpegs(names)), tmp_path / "out").kept == {"train": 5}


def test_killed_run_goes_on(tmp_path):
    to_folder(tmp_path / "in", jpegs(f"{index:04}.jpg" for index in range(300)))
    out = tmp_path / "out"
    slow = (
        "import time, personvit_hf.preparing as p\n"
        "decode = p.decode_image\n"
        "p.decode_image = lambda *a: (time.sleep(0.02), decode(*a))\n"
        f"p.prepare_dataset({str(tmp_path / 'in')!r}, {str(out)!r}, shard_images=50)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow])
    while not list(out.glob("train-00001-*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in out.glob("train-*.parquet")}
    assert 2 <= len(done) < 6
    report = prepare_dataset(tmp_path / "in", out, shard_images=50)
    assert (report.read, report.kept, report.new_shards) == (300, {"train": 300}, 6 - len(done))
    assert done.items() <= {file: file.stat().st_mtime_ns for file in out.glob("train-*.parquet")}.items()
    assert not list(out.glob("*.part")) and not list(out.glob(".*.part"))
    assert len(load_person_images(out)) == 300


@pytest.fixture
def small(tmp_path):
    return to_folder(tmp_path / "in", jpegs(f"{index}.jpg" for index in range(4)))


def test_shard_cut_off_is_written_again(small, tmp_path):
    prepare_dataset(small, tmp_path / "out", shard_images=2)
    shard = tmp_path / "out" / "train-00001-of-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert prepare_dataset(small, tmp_path / "out", shard_images=2).new_shards == 1
    assert shard.read_bytes() == whole


@pytest.mark.parametrize(
    "told", ["[1]", "{}", "null", '{"rows": 1, "skipped": 3}', '{"rows": 1, "skipped": {"a": 3}}']
)
def test_shard_that_tells_nothing_of_itself_is_written_again(small, tmp_path, told):
    report = prepare_dataset(small, tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.parquet")
    whole = shard.read_bytes()
    pq.write_table(pq.read_table(shard).replace_schema_metadata({"personvit": told}), shard)
    again = prepare_dataset(small, tmp_path / "out")
    assert again == report and shard.read_bytes() == whole


def test_other_source_or_size_is_refused(small, tmp_path):
    prepare_dataset(small, tmp_path / "out", shard_images=2)
    with pytest.raises(ValueError, match="another source or size"):
        prepare_dataset(small, tmp_path / "out", shard_images=1)
    (small / "0.jpg").rename(small / "00.jpg")
    with pytest.raises(ValueError, match="holds other images"):
        prepare_dataset(small, tmp_path / "out", shard_images=2)


def test_other_pictures_of_the_same_names_are_refused(tmp_path):
    crops = [{f"{j}.jpg": picture(4 * camera + j) for j in range(4)} for camera in range(2)]
    cameras = [to_folder(tmp_path / f"cam{camera}" / "crops", files) for camera, files in enumerate(crops)]
    prepare_dataset(cameras[0], tmp_path / "out", shard_images=2)
    with pytest.raises(ValueError, match=r"train-00000-of-00002\.parquet: holds other images"):
        prepare_dataset(cameras[1], tmp_path / "out", shard_images=2)


def test_repaired_picture_is_added_once_its_shard_is_removed(small, tmp_path):
    (small / "3.jpg").write_bytes(JPEG[:-900])
    (small / "4.jpg").symlink_to(small / "later.jpg")
    out = tmp_path / "out"
    report = prepare_dataset(small, out, shard_images=3)
    assert report.skipped == {DAMAGED: ["3.jpg"], "can't be opened": ["4.jpg"]}
    (small / "3.jpg").write_bytes(JPEG)
    with pytest.raises(ValueError, match="remove this file to write it again"):
        prepare_dataset(small, out, shard_images=3)
    (out / "train-00001-of-00002.parquet").unlink()
    report = prepare_dataset(small, out, shard_images=3)
    assert (report.kept, report.new_shards) == ({"train": 4}, 1)


@pytest.mark.parametrize("name", ["crops", "crops.zip", "crops.tar", "crops.lmdb"])
def test_moved_source_is_the_same_and_a_replaced_one_is_not(tmp_path, name):
    def write(content):
        path = tmp_path / "in" / name
        if name == "crops":
            to_folder(path, {"0.jpg": content})
        elif name == "crops.lmdb":
            lmdb = pytest.importorskip("lmdb")
            with lmdb.open(str(path), map_size=2**20, subdir=False) as database, database.begin(write=True) as changes:
                changes.put(b"0", content)
        else:
            to_archive(path, {"0.jpg": content})

    (tmp_path / "in").mkdir()
    write(JPEG)
    assert prepare_dataset(tmp_path / "in" / name, tmp_path / "out").new_shards == 1
    shutil.move(tmp_path / "in", tmp_path / "moved")
    assert prepare_dataset(tmp_path / "moved" / name, tmp_path / "out").new_shards == 0
    shutil.move(tmp_path / "moved", tmp_path / "in")
    write(JPEG[::-1])  # of the same size
    with pytest.raises(ValueError, match="holds other images"):
        prepare_dataset(tmp_path / "in" / name, tmp_path / "out")


def test_two_processes_in_one_folder(small, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with filelock.FileLock(out / ".prepare.lock"), pytest.raises(ValueError, match="another process"):
        prepare_dataset(small, out)
    assert prepare_dataset(small, out).kept == {"train": 4}


def test_no_space_left(small, tmp_path):
    (small / "9.png").write_bytes(picture(format="PNG", size=(300, 300)))
    code = (
        "import resource, signal, sys; from personvit_hf.preparing import prepare_dataset\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))\n"
        f"prepare_dataset({str(small)!r}, {str(tmp_path / 'out')!r}, shard_images=2)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 1
    assert "2 of 3 shards are whole; make room" in process.stderr
    assert not list((tmp_path / "out").glob(".*.part"))
    assert prepare_dataset(small, tmp_path / "out", shard_images=2).new_shards == 1


def test_unlabelled_archives_and_lmdb_give_the_same_rows(tmp_path):
    files = jpegs(f"34_01_0341_0000186{index}.jpg" for index in range(3))
    places = [to_archive(tmp_path / "a" / "LUP" / "images.zip", files), to_archive(tmp_path / "b" / "lup.tar", files)]
    places.append(to_folder(tmp_path / "c" / "LUPerson" / "images", files))
    try:
        import lmdb
    except ImportError:
        lmdb = None
    if lmdb is not None:
        (tmp_path / "d" / "lup").mkdir(parents=True)
        with (
            lmdb.open(str(tmp_path / "d" / "lup" / "lmdb"), map_size=2**20) as database,
            database.begin(write=True) as t,
        ):
            t.put(b"__len__", b"\x80\x04K\x03.")
            for name, content in files.items():
                t.put(name.removesuffix(".jpg").encode(), content)
        (tmp_path / "d" / "lup" / "keys.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    for place in "abcd" if lmdb else "abc":
        rows = load_person_images("luperson", tmp_path / place)
        images = PersonImages(rows)
        expected = [np.asarray(Image.open(io.BytesIO(content))) for content in files.values()]
        for index, pixels in enumerate(expected):
            np.testing.assert_array_equal(images[index], pixels)
        loader = DataLoader(images, batch_size=3, num_workers=1, collate_fn=split_broken)
        (good, broken) = next(iter(loader))  # a forked worker opens its own
        assert len(good) == 3 and not broken
        prepared = prepare_dataset("luperson", tmp_path / f"out_{place}", tmp_path / place)
        assert prepared.kept == {"train": 3}


def test_compressed_tar_is_prepared(tmp_path):
    files = {f"MSMT17_V1/{name}": content for name, content in msmt17().items()}
    to_archive(tmp_path / "MSMT17_V1.tar.gz", files)
    with pytest.warns(UserWarning, match="msmt17-v1 there is not complete"):
        report = prepare_dataset("msmt17", tmp_path / "out", tmp_path)
    assert report.kept == {"train": 3, "query": 1, "gallery": 2}
    assert len(report.skipped["no image of a split"]) == 4  # the lists
    with pytest.raises(ValueError, match="compressed tar.*data prepare"):
        load_person_images(to_archive(tmp_path / "crops.tar.gz", jpegs(["1.jpg"])))


def hostile_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("good.jpg", "../up.jpg", "/etc/root.jpg", "C:/x.jpg", "a\\..\\b.jpg", "__MACOSX/._good.jpg"):
            archive.writestr(name, JPEG)
        archive.writestr(zipfile.ZipInfo("lzma.jpg"), JPEG, zipfile.ZIP_LZMA)
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("bomb.jpg", bytes(file_trees.MAX_FILE_BYTES + 1), zipfile.ZIP_DEFLATED)
    return {"unsafe name": 4, "hidden file": 1, "compression method not read here": 1, "link": 1, "file too large": 1}


def hostile_tar(path):
    with tarfile.open(path, "w") as archive:
        for name in ("good.jpg", "../up.jpg", "/etc/root.jpg", "good.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(JPEG)
            archive.addfile(member, io.BytesIO(JPEG))
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("device.jpg", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    return {"unsafe name": 2, "second file of the same name": 1, "link": 2, "no regular file": 1}


@pytest.mark.parametrize("make", [hostile_zip, hostile_tar])
def test_hostile_archive(tmp_path, make):
    path = tmp_path / f"x.{make.__name__[-3:]}"
    expected = make(path)
    report = prepare_dataset(path, tmp_path / "out")
    assert {reason: len(names) for reason, names in report.skipped.items()} == expected
    assert report.kept == {"train": 1}
    with pytest.warns(UserWarning, match="passed over.*unsafe name"):
        assert len(load_person_images(path)) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name != "cache") == ["out", path.name]


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_archive_cut_off(tmp_path, suffix):
    path = to_archive(tmp_path / f"x{suffix}", jpegs(f"{index}.jpg" for index in range(40)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if suffix == ".zip":
        with pytest.raises(ValueError, match=r"x\.zip: no zip archive that can be read, or cut off"):
            prepare_dataset(path, tmp_path / "out")
        return
    report = prepare_dataset(path, tmp_path / "out")
    assert 10 < report.kept["train"] < 30
    assert "everything after" in report.skipped["archive cut off or damaged"][0]


def test_zip_member_that_unpacks_to_more_than_it_says(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", JPEG)
        archive.writestr("2.jpg", bytes(50_000_000))
    size = (50_000_000).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (1000).to_bytes(4, "little")))
    report = prepare_dataset(path, tmp_path / "out")
    assert report.skipped == {DAMAGED: ["2.jpg"]}


def test_tar_header_that_would_fill_the_memory(tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**33
    (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(ValueError, match="header of 8589934592 bytes"):
        prepare_dataset(tmp_path / "x.tar", tmp_path / "out")


def test_nothing_to_keep(tmp_path):
    to_folder(tmp_path / "in", {"a.jpg": b"", "b.txt": b"?"})
    with pytest.raises(ValueError, match=r"none of the images(.|\n)*empty file: a.jpg"):
        prepare_dataset(tmp_path / "in", tmp_path / "out")


def test_folder_that_cannot_be_read(small, tmp_path, monkeypatch):
    (small / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read anything, so permissions can't test it
    with pytest.raises(PermissionError, match="locked"):
        prepare_dataset(small, tmp_path / "out")
