import datasets
import pytest
from layouts import DUKE, MARKET, jpegs, msmt17, to_archive, to_folder

from personvit_hf.reid_data import load_reid_dataset
from personvit_hf.reid_layouts import BENCHMARKS, benchmarks_called

pytestmark = pytest.mark.usefixtures("own_cache")


def rows(data, split):
    return list(zip(data[split]["person_id"], data[split]["camera_id"], strict=True))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Market-1501-v15.09.15", "market1501"),
        ("DukeMTMC-reID", "dukemtmc-reid"),
        ("Occluded_Duke", "occluded-duke"),
        ("MSMT17_V2", "msmt17-v2"),
        ("luperson", None),
    ],
)
def test_names_and_folder_names(name, found):
    assert [benchmark.name for benchmark in benchmarks_called(name)] == ([found] if found else [])


def test_published_counts_add_up():
    market, duke, occluded, first, second = BENCHMARKS
    assert sum(counts.images for counts in market.counts.values()) == 12936 + 3368 + 15913 + 3819
    assert sum(counts.images for counts in duke.counts.values()) == 36411
    assert occluded.counts["gallery"] == duke.counts["gallery"]
    assert first.counts == second.counts
    assert first.counts["train"].persons + first.counts["gallery"].persons == 4101


@pytest.mark.parametrize("place", ["Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "."])
def test_market_by_name(tmp_path, place):
    files = {
        **jpegs(MARKET),
        "gt_query/0012_c2s1_000001_00_good.mat": b"",
        "gt_query/0013_c1s1_000001_00_junk.mat": b"",
    }
    to_folder(tmp_path / place, files)
    with pytest.warns(UserWarning, match="market1501 there is not complete") as warned:
        data = load_reid_dataset("market1501", tmp_path)
    assert rows(data, "train") == [(2, 0), (7, 2)]
    assert rows(data, "gallery") == [(-1, 0), (0, 2), (12, 4)]
    text = str(warned[0].message)
    assert "train: found 2 images of 2 persons by 2 cameras, published are 12936 of 751 by 6" in text
    assert "no image of persons 1, 3-6, 8-11, 13-1501" in text
    assert "missing queries, by gt_query: 0013_c1s1_000001_00.jpg" in text


@pytest.mark.parametrize("version", ["msmt17-v1", "msmt17-v2", "MSMT17"])
def test_msmt17(tmp_path, version):
    v2 = version == "msmt17-v2"
    files = msmt17("mask_train_V2", "mask_test_v2") if v2 else msmt17()
    lost = ("mask_test_v2" if v2 else "test") + "/0001/0001_000_04_0113noon_0012_0.jpg"
    del files[lost]
    to_folder(tmp_path / ("MSMT17_V2" if v2 else "MSMT17_V1"), files)
    with pytest.warns(UserWarning, match=f"{lost}: listed, but not there"):
        data = load_reid_dataset(version, root=tmp_path)
    assert rows(data, "train") == [(1, 0), (1, 14), (2, 4)]  # train and val; 0 would be a distractor
    assert rows(data, "query") == [(1042, 1)]
    assert rows(data, "gallery") == [(1042, 2)]
    assert data["train"][0]["image"].size == (8, 16)


@pytest.mark.parametrize("other", ["list_train.txt", "list_val.txt"])
def test_a_picture_listed_twice_is_refused(tmp_path, other):
    files = msmt17()
    files[other] += files["list_train.txt"].splitlines()[0] + b"\n"
    to_folder(tmp_path / "MSMT17_V1", files)
    with pytest.raises(ValueError, match=f"{other}, line .*a second time"):
        load_reid_dataset("msmt17", root=tmp_path)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize(
    ("name", "archive", "files"),
    [
        ("dukemtmc-reid", "DukeMTMC-reID", jpegs(DUKE, "DukeMTMC-reID/")),
        ("msmt17", "MSMT17_V1", {f"MSMT17_V1/{name}": content for name, content in msmt17().items()}),
    ],
)
def test_archive_gives_what_its_folder_gives(tmp_path, suffix, name, archive, files):
    to_archive(tmp_path / "packed" / (archive + suffix), files)
    to_folder(tmp_path / "unpacked", files)
    with pytest.warns(UserWarning, match="not complete"):
        packed = load_reid_dataset(name, tmp_path / "packed")
        unpacked = load_reid_dataset(name, tmp_path / "unpacked")
    for split in unpacked:
        assert rows(packed, split) == rows(unpacked, split)
        assert packed[split].features == unpacked[split].features
        for one, other in zip(packed[split], unpacked[split], strict=True):
            assert one["image"].tobytes() == other["image"].tobytes()
    assert not list((tmp_path / "packed").rglob("*.jpg"))


def test_archive_by_its_path(tmp_path):
    data = load_reid_dataset(to_archive(tmp_path / "mine.zip", jpegs(DUKE)))
    assert rows(data, "query") == [(5, 1)]


@pytest.mark.parametrize("suffix", [None, ".zip", ".tar.gz"])
@pytest.mark.parametrize(
    "files, training",
    [(jpegs(MARKET), ("bounding_box_train",)), (msmt17(), ("train", "list_train", "list_val"))],
)
def test_test_pictures_alone(tmp_path, files, training, suffix):
    files = {name: content for name, content in files.items() if not name.startswith(training)}
    path = to_archive(tmp_path / f"mine{suffix}", files) if suffix else to_folder(tmp_path / "mine", files)
    data = load_reid_dataset(path, require_train=False)
    assert list(data) == ["query", "gallery"]
    assert len(data["query"]) == 1 and len(data["gallery"]) in (2, 3)
    with pytest.raises(FileNotFoundError, match="no split train; found query, gallery. .* bounding_box_train"):
        load_reid_dataset(path)


def test_a_benchmarks_test_pictures_alone_are_told(tmp_path):
    files = {name: content for name, content in jpegs(MARKET).items() if not name.startswith("bounding_box_train")}
    with pytest.warns(UserWarning, match="train: found 0 images of 0 persons by 0 cameras, published are 12936"):
        data = load_reid_dataset("market1501", to_folder(tmp_path, files), require_train=False)
    assert list(data) == ["query", "gallery"]


def test_a_name_without_a_root_says_what_to_do():
    with pytest.raises(FileNotFoundError, match="root="):
        load_reid_dataset("market1501")


def test_not_found_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match="isn't there.*bounding_box_train"):
        load_reid_dataset("market1501", tmp_path)
    with pytest.raises(FileNotFoundError, match="to look for"):
        load_reid_dataset("market1501", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no benchmark of this name; known are market1501"):
        load_reid_dataset("cuhk03", tmp_path)


def test_both_versions_of_msmt17_are_not_guessed(tmp_path):
    to_folder(tmp_path / "MSMT17_V1", msmt17())
    to_folder(tmp_path / "MSMT17_V2", msmt17("mask_train_v2", "mask_test_v2"))
    with pytest.raises(ValueError, match="several copies of msmt17"):
        load_reid_dataset("msmt17", tmp_path)
    with pytest.warns(UserWarning):
        assert (
            "mask_train_v2"
            in load_reid_dataset("msmt17-v2", tmp_path)["train"].cast_column("image", datasets.Image(decode=False))[0][
                "image"
            ]["path"]
        )


@pytest.mark.parametrize("line", ["no_person.jpg", "../../../etc/0000_000_01_x.jpg x", "0000/0000_000_00_x.jpg 0"])
def test_msmt17_list_that_makes_no_sense(tmp_path, line):
    files = msmt17()
    files["list_query.txt"] = line.encode()
    to_folder(tmp_path, files)
    with pytest.raises(ValueError, match="list_query.txt, line 1: expected <path> <person>"):
        load_reid_dataset("msmt17", tmp_path)


def test_msmt17_list_cannot_point_outside(tmp_path):
    files = msmt17()
    (tmp_path / "0000_000_01_x.jpg").write_bytes(files["train/0000/0000_000_01_0303morning_0008_0.jpg"])
    files["list_query.txt"] += b"../../0000_000_01_x.jpg 0\n"
    to_folder(tmp_path / "msmt17", files)
    with pytest.warns(UserWarning, match="test/../../0000_000_01_x.jpg: listed, but not there"):
        assert len(load_reid_dataset("msmt17", tmp_path)["query"]) == 1


def test_msmt17_list_missing(tmp_path):
    files = msmt17()
    del files["list_val.txt"]
    with pytest.raises(FileNotFoundError, match="list_val.txt"):
        load_reid_dataset(to_folder(tmp_path, files))
