import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import jpegs, picture, to_folder
from typer.testing import CliRunner

from personvit_hf import PersonViTConfig, PersonViTImageProcessor, PersonViTModel, load_person_images
from personvit_hf.cli import app
from personvit_hf.embedding import EmbeddingFolder
from personvit_hf.person_images import SELECTION_METADATA
from personvit_hf.selection import forgetting_scores, near_duplicates, select_images, write_selection
from personvit_hf.shards import load_person_stream

PERSONVIT = Path(sys.executable).with_name("personvit")
pytestmark = pytest.mark.usefixtures("own_cache")


def unit(vectors):
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def folder(embeddings, num_images=None, rows=None):
    rows = np.arange(len(embeddings)) if rows is None else np.array(rows)
    settings = {"num_images": num_images or len(embeddings), "weights": "sha256:0", "model": "m"}
    return EmbeddingFolder(Path("f"), settings, unit(embeddings), rows, [f"{row}.jpg" for row in rows], {})


def test_score_is_the_angle_between_features_before_and_after():
    before, after = unit([[1, 0], [1, 0], [1, 0], [1, 0]]), unit([[2, 0], [1, 1], [0, 1], [-1, 0]])
    np.testing.assert_allclose(forgetting_scores(before, after), [0, 1 - 0.5**0.5, 1, 2], atol=1e-6)
    with pytest.raises(ValueError, match=r"\(4, 2\), of the adapted one \(3, 2\)"):
        forgetting_scores(before, after[:3])


def by_the_book(embeddings, threshold, order):
    first, repeated = [], np.full(len(embeddings), -1)
    for i in order:
        nearest = max(first, key=lambda j: (embeddings[i] @ embeddings[j], -first.index(j)), default=None)
        if nearest is not None and embeddings[i] @ embeddings[nearest] >= threshold:
            repeated[i] = nearest
        else:
            first.append(i)
    return repeated


@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([0.5, 0.8, 0.95]))
def test_near_duplicates(seed, num_images, threshold):
    import personvit_hf.selection as selection

    rng = np.random.default_rng(seed)
    raw = unit(rng.normal(size=(num_images, 3)) + [5, 0, 0])
    embeddings = unit(raw - raw.mean(axis=0)) if num_images > 1 else raw
    order = rng.permutation(num_images)
    whole = near_duplicates(raw, threshold, order)
    expected = by_the_book(embeddings, threshold, order)
    np.testing.assert_array_equal(whole >= 0, expected >= 0)
    block, selection._BLOCK_IMAGES = selection._BLOCK_IMAGES, 7
    try:
        parts = near_duplicates(raw, threshold, order)
    finally:
        selection._BLOCK_IMAGES = block
    np.testing.assert_array_equal(parts >= 0, expected >= 0)
    for found in (whole, parts):
        for i in np.flatnonzero(found >= 0):
            assert found[found[i]] == -1 and embeddings[i] @ embeddings[found[i]] >= threshold - 1e-6


def test_selection_by_cfs_counts_every_image():
    before = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0]]
    after = [[1, 0.01, 0], [0, 0.3, -1], [0, 0.2, 1], [1, 0.011, 0], [1, -1, 0]]
    generic, adapted = folder(before, 6, [0, 1, 2, 4, 5]), folder(after, 6, [0, 1, 2, 4, 5])
    found = select_images(6, "cfs", 1 / 3, generic, adapted, near_duplicate=0.999)
    assert found.kept.tolist() == [True, False, True, False, False, False]  # row 3 is broken
    assert found.duplicate_of.tolist() == [-1, -1, -1, -1, 0, -1]
    assert np.isnan(found.scores).tolist() == [False, False, False, True, False, False]
    assert str(found) == ("6 images: kept 2, left out 1 broken, 1 near-duplicates and 2 with higher scores")
    assert select_images(6, "cfs", 1.0, generic, adapted).kept.sum() == 5


def test_random_selection():
    first, again, other = (select_images(1000, "random", 0.3, seed=seed) for seed in (0, 0, 1))
    assert first.kept.sum() == 300 and (first.kept == again.kept).all() and (first.kept != other.kept).any()
    both = select_images(4, "random", 1.0, adapted=folder([[1, 0], [1, 0], [0, 1]], 4, [0, 1, 3]), near_duplicate=0.99)
    assert both.kept.sum() == 2 and not both.kept[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": "loss"}, "`by` must be one of cfs, random"),
        ({"keep": 0}, "`keep` must be a share"),
        ({"keep": 1.5}, "`keep` must be a share"),
        ({"keep": float("nan")}, "`keep` must be a share"),
        ({"generic": None}, "features of two models"),
        ({"adapted": None, "by": "random", "near_duplicate": 0.9}, "give `adapted`"),
        ({"near_duplicate": 1.1}, "^Near-duplicates are told by a cosine similarity in"),
        ({"near_duplicate": 0}, "cosine similarity in"),
        ({"num_images": 4}, "features of 3 images, the data have 4"),
        ({"generic": folder([[1, 0], [1, 0], [0, 1]])}, "same architecture"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_settings(change, message):
    features = folder([[1, 0, 0], [1, 0, 1], [0, 1, 0]])
    settings = {"num_images": 3, "by": "cfs", "keep": 0.5, "generic": features, "adapted": features} | change
    with pytest.raises(ValueError, match=message):
        select_images(**settings)


@pytest.fixture
def crops(tmp_path):
    return to_folder(tmp_path / "in", jpegs(f"{i}.jpg" for i in range(6)) | {"9.jpg": picture(0)})


def test_index_stands_for_its_images(crops, tmp_path):
    index = tmp_path / "half.parquet"
    chosen = select_images(7, "random", 0.5)
    write_selection(chosen, index, str(crops), {"by": "random"})
    rows = load_person_images(index)
    whole = load_person_images(crops)
    assert rows["image"] == [whole[int(row)]["image"] for row in np.flatnonzero(chosen.kept)]
    assert index.stat().st_size < 10_000
    with pytest.raises(ValueError, match="can't be streamed; read it without streaming"):
        load_person_stream(index)
    assert pq.read_table(index).column_names == ["row", "name", "score", "duplicate_of", "kept"]


def test_bad_index(crops, tmp_path):
    index = tmp_path / "half.parquet"
    chosen = select_images(7, "random", 0.5)
    with pytest.raises(ValueError, match="ends in .parquet"):
        write_selection(chosen, tmp_path / "half.json", str(crops), {})
    write_selection(chosen, index, str(crops), {})
    with pytest.raises(FileExistsError):
        write_selection(chosen, index, str(crops), {})
    with pytest.raises(ValueError, match="half.parquet: this is an index.*Select from the data themselves"):
        write_selection(chosen, tmp_path / "nested.parquet", str(index), {})
    for name in ("nested.parquet", "itself.PARQUET"):
        data = index if name == "nested.parquet" else tmp_path / name
        told = b'{"data": "%s", "num_images": 7}' % str(data).encode()
        pq.write_table(pq.read_table(index).replace_schema_metadata({SELECTION_METADATA: told}), tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: an index of an index"):
            load_person_images(tmp_path / name)
    (crops / "0.jpg").unlink()
    with pytest.raises(ValueError, match="had 7 images; now 6"):
        load_person_images(index)
    crops.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="the data that it selects from are gone"):
        load_person_images(index)
    for told in (b"?", b"[]", b'{"data": 1, "num_images": 2}'):
        pq.write_table(pa.table({"row": [0]}).replace_schema_metadata({SELECTION_METADATA: told}), index)
        with pytest.raises(ValueError, match="doesn't say what it is an index of"):
            load_person_images(index)
    told = b'{"data": "%s", "num_images": 6}' % str(tmp_path / "elsewhere").encode()
    for rows, kept, message in (
        ([0], None, "index can't be read"),
        ([77], [True], "rows outside 0 to 5"),
        ([-1], [True], "rows outside 0 to 5"),
        ([0, 1], [False, False], "keeps no image"),
        (["a"], [True], "expected an int64"),
        ([0.5], [True], "expected an int64"),
        ([0, 1], [1, 0], "expected an int64"),
        ([0, None], [True, True], "expected an int64"),
    ):
        table = pa.table({"row": rows} | ({"kept": kept} if kept else {}))
        pq.write_table(table.replace_schema_metadata({SELECTION_METADATA: told}), index)
        with pytest.raises(ValueError, match=message):
            load_person_images(index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--by", "loss"], "`by` must be"),
        (["--keep", "0"], "`keep` must be"),
        (["--near-duplicates", "95"], "cosine similarity in"),
        (["--out", "kept.json"], "ends in .parquet"),
        (["--out", "in/0.jpg/kept.parquet"], "can't be written"),
        (["--adapted", "no/such/model"], "no/such/model: neither folder nor Hub name"),
        ([], "features of two models"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_the_command_checks_all_before_it_embeds(crops, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("personvit_hf.embedding.write_embeddings", None)
    monkeypatch.chdir(tmp_path)
    PersonViTConfig().save_pretrained("before")
    arguments = ["data", "select", "in", "--out", "kept.parquet", "--generic", "before", *change]
    if "--adapted" not in change and change:
        arguments += ["--adapted", "before"]
    result = CliRunner().invoke(app, arguments)
    assert message in str(result.exception)


def test_the_command_from_checkpoints_to_an_index(crops, tmp_path):
    config = PersonViTConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=32,
        image_size=[32, 16],
        patch_size=8,
    )
    for name in ("before", "after"):
        PersonViTModel(config).save_pretrained(tmp_path / name)
        PersonViTImageProcessor(size={"height": 32, "width": 16}).save_pretrained(tmp_path / name)
    index = tmp_path / "kept.parquet"
    command = [PERSONVIT, "data", "select", crops, "--out", index, "--near-duplicates", "0.9999", "--keep", "0.8"]
    command += ["--generic", tmp_path / "before", "--adapted", tmp_path / "after", "--num-workers", "0"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "7 images: kept" in process.stdout and "1 near-duplicates" in process.stdout
    broken = tmp_path / "broken"
    shutil.copytree(crops, broken)
    (broken / "zz.png").write_bytes(b"no picture")
    again = [
        *map(str, command[:3]),
        broken,
        "--out",
        tmp_path / "b.parquet",
        *command[6:],
        "--max-broken-share",
        "0.2",
    ]
    process = subprocess.run(again, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "left out 1 broken" in process.stdout
    table = pq.read_table(index).to_pydict()
    assert {table["duplicate_of"][0], table["duplicate_of"][6]} == {-1, 6} or table["duplicate_of"][6] == 0
    assert len(load_person_images(index)) == sum(table["kept"]) <= 6
