import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from personvit_hf.reid_data import load_reid_dataset, person_labels, require_true_match

DEMO = Path(__file__).parents[1] / "examples" / "data"
MARKET = {
    "bounding_box_train": ["0007_c1s1_000451_03.jpg", "0002_c6s3_000451_03.jpg", "0002_c1s1_000451_03.jpg"],
    "query": ["0012_c2s1_000001_00.jpg"],
    "bounding_box_test": ["0000_c3s1_000001_00.jpg", "-1_c1s1_000401_03.jpg", "0012_c5s1_000001_01.jpg"],
}
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def market(tmp_path):
    root = tmp_path / "market"
    for folder, names in MARKET.items():
        (root / folder).mkdir(parents=True)
        for red, name in enumerate(names):
            Image.new("RGB", (8, 16), (red * 80, 0, 0)).save(root / folder / name)
    return root


def table(people=(1, 2), cameras=(0, 1), **extra):
    pictures = [Image.new("RGB", (4, 8), (index, 0, 0)) for index, _ in enumerate(people)]
    columns = {"image": pictures, "person_id": list(people), "camera_id": list(cameras), **extra}
    features = datasets.Dataset.from_dict({k: v for k, v in columns.items() if k != "image"}).features
    return datasets.Dataset.from_dict(columns, datasets.Features({"image": datasets.Image(), **features}))


def parquet_folder(root, *, train=None, query=None, gallery=None):
    root.mkdir()
    for name, rows in {"train": train, "query": query, "gallery": gallery}.items():
        (rows or table()).to_parquet(root / f"{name}.parquet")
    return root


def test_market_tree(market):
    for clutter in ("Thumbs.db", "._0002_c1s1_000451_03.jpg", "readme.txt"):
        (market / "bounding_box_train" / clutter).write_bytes(b"?")
    data = load_reid_dataset(market)
    assert list(data) == ["train", "query", "gallery"]
    assert data["train"]["person_id"][:] == [2, 2, 7]  # by file name
    assert data["train"]["camera_id"][:] == [0, 5, 0]  # c1 is camera 0
    assert data["gallery"]["person_id"][:] == [-1, 0, 12]
    assert data["query"].column_names == ["image", "person_id", "camera_id"]
    for column in ("person_id", "camera_id"):
        assert data["query"].features[column] == datasets.Value("int64")
    picture = data["train"][2]["image"]
    assert picture.size == (8, 16)
    assert picture.getpixel((0, 0))[0] < 10  # the first one written


def test_relative_market_tree_survives_a_change_of_folder(market, monkeypatch):
    monkeypatch.chdir(market.parent)
    data = load_reid_dataset("market")
    monkeypatch.chdir("/")
    assert data["query"][0]["image"].size == (8, 16)


@pytest.mark.parametrize("name", ["person.jpg", "0002_c0s1_000451_03.jpg", "-2_c1s1_0.png", "x0002_c1s1_0.jpg"])
def test_market_name_without_ids(market, name):
    (market / "query" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"query/{name}.*no ids.*0002_c1s1_000451_03.jpg"):
        load_reid_dataset(market)


def test_market_folder_missing(market):
    (market / "bounding_box_test").rename(market / "test")
    with pytest.raises(FileNotFoundError, match="bounding_box_test.*no such folder"):
        load_reid_dataset(market)


def test_market_split_empty(market):
    for image in (market / "query").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="query: no image"):
        load_reid_dataset(market)


def test_parquet_without_readme(tmp_path):
    rows = table(people=[-1, 0, 5], cameras=[1, 2, 3], frame=[7, 8, 9])
    narrow = rows.cast_column("person_id", datasets.Value("int16"))
    data = load_reid_dataset(parquet_folder(tmp_path / "p", gallery=narrow))
    assert data["gallery"]["person_id"][:] == [-1, 0, 5]
    assert data["gallery"].features["person_id"] == datasets.Value("int64")
    assert data["gallery"].column_names == ["image", "person_id", "camera_id", "frame"]
    assert data["gallery"][2]["image"].getpixel((0, 0)) == (2, 0, 0)


def test_ids_beyond_int64(tmp_path):
    root = parquet_folder(tmp_path / "p")
    rows = table().cast_column("person_id", datasets.Value("uint64"))
    rows.to_parquet(root / "query.parquet")
    assert load_reid_dataset(root)["query"]["person_id"][:] == [1, 2]
    whole = pq.read_table(root / "query.parquet")
    pq.write_table(whole.set_column(1, "person_id", pa.array([1, 2**64 - 1], pa.uint64())), root / "query.parquet")
    with pytest.raises(ValueError, match="p, query: `person_id` must fit into int64: .*18446744073709551615"):
        load_reid_dataset(root)


def test_parquet_split_is_named_by_the_innermost_name(tmp_path):
    root = tmp_path / "p"
    for split, people in {"train": [1, 2], "query": [3, 4], "gallery": [5, 6]}.items():
        folder = root / "train_and_test" / ("gallery" if split == "gallery" else "")
        folder.mkdir(parents=True, exist_ok=True)
        table(people).to_parquet(folder / ("0.parquet" if split == "gallery" else f"{split}-0.parquet"))
    data = load_reid_dataset(root)
    assert [rows["person_id"][:] for rows in data.values()] == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("name", ["p[1]", "p*"])
def test_folder_name_is_no_pattern(tmp_path, name):
    root = parquet_folder(tmp_path / name)
    parquet_folder(tmp_path / "p1", query=table([8, 8]))
    assert load_reid_dataset(root)["query"]["person_id"][:] == [1, 2]
    table([9, 9]).to_parquet(root / "other.parquet")
    files = "".join(f"  - {{split: {split}, path: other.parquet}}\n" for split in ("train", "query", "gallery"))
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: labelled\n  data_files:\n{files}---\n")
    assert load_reid_dataset(root)["query"]["person_id"][:] == [9, 9]
    (root / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match="README.md.*can't be read"):
        load_reid_dataset(root)


def test_an_empty_path_is_not_the_current_folder(market, monkeypatch):
    monkeypatch.chdir(market)
    for arguments in ({"name_or_path": ""}, {"name_or_path": "market1501", "root": ""}):
        with pytest.raises(FileNotFoundError, match="An empty path.*variable"):
            load_reid_dataset(**arguments)


def test_readme_config_is_used(tmp_path):
    root = parquet_folder(tmp_path / "p")
    table([9, 9]).to_parquet(root / "other.parquet")
    files = "".join(f"  - {{split: {split}, path: other.parquet}}\n" for split in ("train", "query", "gallery"))
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: labelled\n  data_files:\n{files}---\n")
    assert load_reid_dataset(root)["query"]["person_id"][:] == [9, 9]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (table().remove_columns("camera_id"), "query: no column `camera_id`; found image, person_id"),
        (table().remove_columns("image"), "query: no column `image`"),
        (table(people=["a", "b"]), "query: `person_id` must hold integers.*string"),
        (table(people=[1, None]), "query: `person_id` must hold integers.*1 empty"),
        (table(people=[1.0, 2.0]), "query: `person_id` must hold integers.*float"),
        (table().select([]), "query.*(empty|can't be read)"),
        (table().remove_columns("image").add_column("image", [1, 2]), "query: column `image` holds.*int64"),
    ],
)
def test_bad_parquet(tmp_path, rows, message):
    root = parquet_folder(tmp_path / "p")
    rows.to_parquet(root / "query.parquet")
    with pytest.raises(ValueError, match=message):
        load_reid_dataset(root)


def test_parquet_split_missing(tmp_path):
    root = parquet_folder(tmp_path / "p")
    (root / "query.parquet").unlink()
    with pytest.raises(ValueError, match="starts with query; found gallery.parquet, train.parquet"):
        load_reid_dataset(root)


@pytest.mark.parametrize("with_readme", [False, True])
def test_parquet_for_evaluation_alone(tmp_path, with_readme):
    root = parquet_folder(tmp_path / "p", query=table(cameras=(1, 0)))
    (root / "train.parquet").unlink()
    if with_readme:
        files = "".join(f"  - {{split: {split}, path: {split}.parquet}}\n" for split in ("gallery", "query"))
        (root / "README.md").write_text(f"---\nconfigs:\n- config_name: labelled\n  data_files:\n{files}---\n")
    data = load_reid_dataset(root, require_train=False)
    assert list(data) == ["query", "gallery"]
    require_true_match(data, "p")
    with pytest.raises(ValueError, match=r"p: no split train; found (query, gallery|gallery, query)\."):
        load_reid_dataset(root)


def test_readme_split_missing(tmp_path):
    root = parquet_folder(tmp_path / "p")
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: labelled\n  data_files:\n  - {split: train, path: train.parquet}\n---\n"
    )
    with pytest.raises(ValueError, match="no split query, gallery; found train"):
        load_reid_dataset(root)


def test_corrupt_parquet(tmp_path):
    root = parquet_folder(tmp_path / "p")
    (root / "query.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="can't be read"):
        load_reid_dataset(root)


def test_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="neither a Market-1501 tree"):
        load_reid_dataset(tmp_path)


@pytest.mark.parametrize("name", ["./missing", "/missing", f"missing{os.sep}deep{os.sep}er", "missing", "~/missing"])
def test_missing_path_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda *args: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_reid_dataset(name)


@pytest.mark.parametrize("error", [ConnectionError, datasets.exceptions.DatasetNotFoundError])
def test_hub_data_set_not_reached(error, monkeypatch):
    def refuse(name):
        raise error("no")

    monkeypatch.setattr(datasets, "get_dataset_config_names", refuse)
    with pytest.raises(FileNotFoundError, match="someone/nothing.*Hub"):
        load_reid_dataset("someone/nothing")


def test_hub_data_set(monkeypatch):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return datasets.DatasetDict({split: table() for split in ("gallery", "query", "train")})

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["labelled", "unlabelled"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load_reid_dataset("someone/people")) == ["train", "query", "gallery"]
    assert asked == [("someone/people", "labelled")]


def test_person_labels():
    assert person_labels([70, -1, 3, 0, 70, 12]) == {3: 0, 12: 1, 70: 2}
    with pytest.raises(ValueError, match="no id above 0"):
        person_labels(np.array([0, -1]))


@given(st.lists(st.integers(-1, 10**6), min_size=1), st.randoms())
def test_person_labels_do_not_know_the_row_order(ids, random):
    people = {person for person in ids if person > 0}
    if not people:
        return
    labels = person_labels(ids)
    shuffled = list(ids)
    random.shuffle(shuffled)
    assert person_labels(shuffled) == labels
    assert set(labels) == people
    assert [labels[person] for person in sorted(people)] == list(range(len(people)))


@pytest.mark.parametrize(
    "query, gallery, scored",
    [
        ([(1, 0), (2, 0)], [(1, 0), (2, 1)], True),
        ([(1, 0), (2, 1)], [(1, 0), (2, 1)], False),  # each by the same camera
        ([(1, 0)], [(2, 1)], False),
        ([(0, 0), (-1, 0)], [(0, 1), (-1, 1)], False),  # nobody
        ([(1, 0)], [(1, 0), (1, 3)], True),
    ],
)
def test_data_in_which_no_query_has_a_true_match(query, gallery, scored):
    dataset = datasets.DatasetDict(query=table(*zip(*query, strict=True)), gallery=table(*zip(*gallery, strict=True)))
    if scored:
        return require_true_match(dataset, "people")
    with pytest.raises(ValueError, match=f"people can't be scored: none of the {len(query)} queries has a true match"):
        require_true_match(dataset, "people")


def test_demo_data():
    data = load_reid_dataset(DEMO)
    train, query, gallery = (set(rows["person_id"][:]) for rows in data.values())
    assert query <= gallery
    assert {-1, 0} <= gallery
    assert not train & (query | gallery)
    assert min(train) > 0
    assert data["query"][0]["image"].mode == "RGB"
    assert set(data["train"]["camera_id"][:]) == set(range(6))
