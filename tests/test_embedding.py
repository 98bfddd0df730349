import io
import json
import logging
import multiprocessing
import os
import subprocess
from datetime import date
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import Table, parquet
from safetensors.numpy import save_file
from torch.testing import assert_close

from personvit_hf import (
    PersonViTConfig,
    PersonViTForPreTraining,
    PersonViTForReID,
    PersonViTImageProcessor,
    PersonViTModel,
    embed_images,
)
from personvit_hf.embedding import model_fingerprint, read_embeddings, write_embeddings
from personvit_hf.image_processing_personvit import PersonViTImageProcessorPil

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
CONFIG = PersonViTConfig(**SIZES, image_size=[32, 16], patch_size=8, num_labels=4, drop_path_rate=0.5)
PROCESSOR = PersonViTImageProcessor(size={"height": 32, "width": 16})


@pytest.fixture(scope="module")
def model() -> PersonViTModel:
    torch.manual_seed(0)
    return PersonViTModel(CONFIG).eval()


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    """Seven pictures of different sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40 + 3 * i, 20 + i, 3), dtype=np.uint8) for i in range(7)]


@pytest.fixture(scope="module")
def paths(arrays, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    names = [folder / f"{i}.png" for i in range(len(arrays))]
    for name, array in zip(names, arrays, strict=True):
        Image.fromarray(array).save(name)
    return names


@pytest.fixture(scope="module")
def embeddings(model, arrays) -> np.ndarray:
    return embed_images(model, PROCESSOR, arrays)


def test_rows_are_the_normalised_cls_features_in_order(model, arrays, embeddings):
    assert embeddings.dtype == np.float32
    for array, row in zip(arrays, embeddings, strict=True):
        with torch.no_grad():
            feature = model(PROCESSOR(images=array, return_tensors="pt").pixel_values).pooler_output[0]
        assert_close(torch.from_numpy(row), feature / feature.norm(), atol=1e-6, rtol=0)
    assert np.ptp(embeddings, axis=0).max() > 0.01  # the pictures differ


def as_bytes(path: Path) -> bytes:
    return path.read_bytes()


def as_row(path: Path) -> dict:
    return {"bytes": path.read_bytes(), "path": None}


@pytest.mark.parametrize("read", [str, Path, as_bytes, as_row, Image.open])
def test_all_kinds_of_images_agree(model, paths, embeddings, read):
    assert np.array_equal(embed_images(model, PROCESSOR, [read(path) for path in paths]), embeddings)


@pytest.mark.parametrize("decode", [True, False])
def test_rows_of_a_data_set_agree(model, paths, embeddings, decode):
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in paths], "person_id": range(len(paths))})
    rows = rows.cast_column("image", datasets.Image(decode=decode))
    assert np.array_equal(embed_images(model, PROCESSOR, rows), embeddings)


def test_transparent_and_grey_pictures_are_read_as_rgb(model, arrays):
    grey = [Image.fromarray(array).convert("L") for array in arrays]
    expected = embed_images(model, PROCESSOR, [picture.convert("RGB") for picture in grey])
    assert np.array_equal(embed_images(model, PROCESSOR, grey), expected)
    opaque = [picture.convert("RGBA") for picture in grey]
    assert np.array_equal(embed_images(model, PROCESSOR, opaque), expected)


@pytest.mark.parametrize("height", [1, 3, 4])
@pytest.mark.parametrize("kind", [PersonViTImageProcessor, PersonViTImageProcessorPil])
def test_low_arrays_are_not_taken_for_channels_first(model, height, kind):
    array = np.random.default_rng(0).integers(0, 256, (height, 20, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    processor = kind(size={"height": 32, "width": 16})
    features = embed_images(model, processor, [Image.fromarray(array), array, content.getvalue()])
    np.testing.assert_allclose(features[1:], features[[0, 0]], atol=1e-6)
    with pytest.raises(ValueError, match=r"image 1 must be \(height, width, 3\) of uint8, got \(3, 40, 20\)"):
        embed_images(model, processor, [array, np.zeros((3, 40, 20), np.uint8)])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batch_size_does_not_matter(model, arrays, embeddings, batch_size):
    again = embed_images(model, PROCESSOR, arrays, batch_size=batch_size)
    assert np.abs(again - embeddings).max() < 1e-6


def test_workers_do_not_matter(model, paths, embeddings):
    assert np.array_equal(embed_images(model, PROCESSOR, paths, num_workers=1), embeddings)


def test_large_batches_of_workers_take_few_file_descriptors(model, arrays, embeddings, monkeypatch):
    """Where they take one an image, a process that may have 1024 waits for its workers for ever."""
    taken, forward, before = [], model.forward, len(os.listdir("/dev/fd"))

    def counted(*args, **options):
        taken.append(len(os.listdir("/dev/fd")) - before)
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", counted)
    found = embed_images(model, PROCESSOR, arrays * 30, batch_size=105, num_workers=1)
    assert len(taken) == 2 and max(taken) < 50
    np.testing.assert_allclose(found, np.tile(embeddings, (30, 1)), atol=1e-6)


def test_workers_outlive_what_stops_a_whole_job(model, paths, embeddings, monkeypatch):
    """A training run that is told to stop while it scores ends that, and then saves."""
    forward = model.forward

    def signalled(*args, **options):
        for worker in multiprocessing.active_children():  # by another process: its own parent's word counts
            subprocess.run(["kill", "-TERM", str(worker.pid)], check=False)
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", signalled)
    found = embed_images(model, PROCESSOR, paths, batch_size=1, num_workers=1)
    np.testing.assert_allclose(found, embeddings, atol=1e-6)


def test_no_images(model):
    assert embed_images(model, PROCESSOR, []).shape == (0, 32)


@pytest.mark.parametrize("neck_feature", ["before", "after"])
def test_reid_model_gives_its_embeddings(arrays, neck_feature):
    torch.manual_seed(0)
    config = PersonViTConfig(**SIZES, image_size=[32, 16], patch_size=8, num_labels=4, neck_feature=neck_feature)
    model = PersonViTForReID(config).eval()
    torch.nn.init.uniform_(model.bottleneck.running_mean)
    features = embed_images(model, PROCESSOR, arrays)
    pixel_values = torch.cat([PROCESSOR(images=array, return_tensors="pt").pixel_values for array in arrays])
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(pixel_values).embeddings, dim=-1)
    assert_close(torch.from_numpy(features), expected, atol=1e-6, rtol=0)
    same = np.abs(features - embed_images(model.personvit, PROCESSOR, arrays)).max() < 1e-6
    assert same == (neck_feature == "before")


def test_camera_ids_reach_their_images(arrays):
    torch.manual_seed(0)
    model = PersonViTModel(PersonViTConfig(**SIZES, image_size=[32, 16], patch_size=8, num_cameras=3)).eval()
    cameras = [2, 0, 1, 1, 0, 2, 2]
    together = embed_images(model, PROCESSOR, arrays, cameras, batch_size=3)
    for i, camera in enumerate(cameras):
        alone = [embed_images(model, PROCESSOR, arrays[i : i + 1], [other])[0] for other in range(3)]
        distances = [np.abs(together[i] - row).max() for row in alone]
        assert distances[camera] < 1e-6
        assert min(distances[:camera] + distances[camera + 1 :]) > 1e-3
    assert np.array_equal(embed_images(model, PROCESSOR, arrays, np.array(cameras), batch_size=3), together)


def test_camera_ids_of_another_length(model, arrays):
    with pytest.raises(ValueError, match="`camera_ids` .* 2 for 7"):
        embed_images(model, PROCESSOR, arrays, [0, 1])


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_random_state_are_as_before(model, arrays, embeddings, training):
    model.train(training)
    state = torch.get_rng_state()
    try:
        assert np.array_equal(embed_images(model, PROCESSOR, arrays), embeddings)  # no stochastic depth
        assert model.training == training
        assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises(RuntimeError):
            embed_images(model, PROCESSOR, [b"no image"])
        assert model.training == training
    finally:
        model.eval()


def test_modules_that_train_on_their_own_go_on_so(arrays):
    config = PersonViTConfig(**SIZES, image_size=[32, 16], patch_size=8, stem="ics")
    config.update({"num_cls_prototypes": 8, "num_patch_prototypes": 8, "projection_hidden_size": 8})
    pretraining = PersonViTForPreTraining(config).train()
    before = [module.training for module in pretraining.modules()]
    embed_images(pretraining.personvit, PROCESSOR, arrays)
    assert [module.training for module in pretraining.modules()] == before
    assert True in [module.training for module in pretraining.personvit.modules()]  # its stem's batch norms


def test_broken_images_are_nan_and_named(model, paths, embeddings, tmp_path, caplog):
    cut_off, missing = tmp_path / "cut_off.png", tmp_path / "missing.png"
    cut_off.write_bytes(paths[0].read_bytes()[:100])
    images = [cut_off, *paths[:3], b"no image", *paths[3:], missing]
    with caplog.at_level(logging.WARNING):
        found = embed_images(model, PROCESSOR, images, batch_size=4, max_broken_share=0.3)
    broken = np.isnan(found).all(axis=1)
    assert np.flatnonzero(broken).tolist() == [0, 4, 9]
    assert np.abs(found[~broken] - embeddings).max() < 1e-6
    for name in (str(cut_off), "image 4", str(missing)):
        assert name in caplog.text
    assert "3 of 10 images" in caplog.text


def test_a_batch_of_broken_images_alone(model, paths, embeddings):
    found = embed_images(model, PROCESSOR, [b"", b"", *paths], batch_size=2, max_broken_share=0.5)
    assert np.isnan(found[:2]).all()
    assert np.abs(found[2:] - embeddings).max() < 1e-6


def test_more_broken_images_than_allowed_stop_it(model, paths):
    images = [*paths, b"no image"]
    with pytest.raises(RuntimeError, match="1 of 8 images are broken") as caught:
        embed_images(model, PROCESSOR, images)
    assert "image 7" in str(caught.value)
    with pytest.raises(RuntimeError, match="share of 0.1 "):
        embed_images(model, PROCESSOR, images, max_broken_share=0.1)
    embed_images(model, PROCESSOR, images, max_broken_share=0.125)


def test_a_broken_row_is_called_by_its_number(model, paths):
    content = io.BytesIO(paths[0].read_bytes())
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": content.getvalue(), "path": None}, {"bytes": b"no image", "path": "b.jpg"}]},
        datasets.Features({"image": datasets.Image(decode=False)}),
    )
    with pytest.raises(RuntimeError, match=r"row 1 \(b\.jpg\)"):
        embed_images(model, PROCESSOR, rows)


@pytest.fixture
def labelled(paths) -> datasets.Dataset:
    columns = {"image": [str(path) for path in paths], "person_id": range(7), "camera_id": [0, 1] * 3 + [2]}
    rows = datasets.Dataset.from_dict({**columns, "extra": list("abcdefg")})
    return rows.cast_column("image", datasets.Image(decode=False))


SOURCE = {"model": "m", "data": "d", "split": None}


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """But for rounding, which depends on a batch's size: shards are smaller than the whole."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_folder_gives_back_what_was_embedded(model, labelled, paths, embeddings, tmp_path):
    assert write_embeddings(model, PROCESSOR, labelled, tmp_path / "out", SOURCE, shard_images=3) == 3
    folder = read_embeddings(tmp_path / "out")
    assert_same(folder.embeddings, embeddings)
    assert folder.names == [str(path) for path in paths]
    assert folder.rows.tolist() == list(range(7))
    assert {name: values.tolist() for name, values in folder.columns.items()} == {
        "person_id": list(range(7)),
        "camera_id": [0, 1, 0, 1, 0, 1, 2],
    }
    assert folder.settings["weights"] == model_fingerprint(model, PROCESSOR)
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_run_goes_on_where_it_was_cut_off(model, labelled, embeddings, tmp_path):
    write_embeddings(model, PROCESSOR, labelled, tmp_path, SOURCE, shard_images=2)
    kept = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    (tmp_path / "shard-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="shard-00002.safetensors is missing"):
        read_embeddings(tmp_path)
    assert write_embeddings(model, PROCESSOR, labelled, tmp_path, {**SOURCE, "model": "moved"}, shard_images=2) == 1
    assert_same(read_embeddings(tmp_path).embeddings, embeddings)
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == kept


def test_data_that_changed_in_place_are_refused(model, labelled, embeddings, tmp_path):
    """After a whole run and after one that was cut off: old and new never stand in one folder."""
    paths = [row["path"] for row in labelled["image"]]

    def now(order: list[int]) -> datasets.Dataset:
        rows = labelled.remove_columns("image").add_column("image", [paths[i] for i in order])
        return rows.cast_column("image", datasets.Image(decode=False))

    write_embeddings(model, PROCESSOR, labelled, tmp_path, SOURCE, shard_images=2)
    for cut_off in (False, True):
        if cut_off:
            (tmp_path / "shard-00000.safetensors").unlink()
        with pytest.raises(ValueError, match=r"row 4 was .*4\.png.*now .*6\.png.*remove"):
            write_embeddings(model, PROCESSOR, now([0, 1, 2, 3, 6, 4, 5]), tmp_path, SOURCE, shard_images=2)
        assert (tmp_path / "shard-00000.safetensors").is_file() != cut_off
    relabelled = labelled.remove_columns("person_id").add_column("person_id", [0, 1, 2, 3, 9, 5, 6])
    with pytest.raises(ValueError, match="row 4 .*person_id.*4.*9"):
        write_embeddings(model, PROCESSOR, relabelled, tmp_path, SOURCE, shard_images=2)
    assert write_embeddings(model, PROCESSOR, now(list(range(7))), tmp_path, SOURCE, shard_images=2) == 1
    folder = read_embeddings(tmp_path)
    assert_same(folder.embeddings, embeddings)
    folder.require_images(labelled)
    with pytest.raises(ValueError, match=r"have changed: row 5 was .*5\.png, now .*6\.png"):
        folder.require_images(now([0, 1, 2, 3, 4, 6, 5]))
    with pytest.raises(ValueError, match="6 images now, 7"):
        folder.require_images(labelled.select(range(6)))


def test_names_are_compared_without_reading_the_images(model, paths, tmp_path):
    """What a run that goes on asks of millions of images must not cost their bytes; broken ones are passed over."""
    contents = [*(path.read_bytes() for path in paths[:3]), b"no image"]
    images = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": images}, features)
    write_embeddings(model, PROCESSOR, rows, tmp_path, SOURCE, shard_images=2, max_broken_share=0.5)
    emptied = datasets.Dataset.from_dict({"image": [{**image, "bytes": b""} for image in images]}, features)
    assert write_embeddings(model, PROCESSOR, emptied, tmp_path, SOURCE, shard_images=2) == 0
    read_embeddings(tmp_path).require_images(emptied)


ODD_IDS = {
    "none in the first shard": ([None] * 4 + [3, None, 5], [None] * 4 + [3, None, 5]),
    "none at all": ([None] * 7, [None] * 7),
    "NaN": ([1.0, float("nan"), 2.0, 3.0, float("nan"), 5.0, 6.0], [1, None, 2, 3, None, 5, 6]),
    "whole floats": ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1, 2, 3, 4, 5, 6, 7]),
    "strings": (["a", None, "b", "c", None, None, "d"], ["a", None, "b", "c", None, None, "d"]),
}


@pytest.mark.parametrize(("stored", "read"), ODD_IDS.values(), ids=ODD_IDS)
def test_images_without_ids(model, labelled, tmp_path, stored, read):
    parquet.write_table(Table.from_pydict({"track_id": stored}), tmp_path / "tracks.parquet")
    column = datasets.Dataset.from_parquet(str(tmp_path / "tracks.parquet"), cache_dir=tmp_path / "cache")
    rows = datasets.concatenate_datasets([labelled, column], axis=1)
    out = tmp_path / "out"
    assert write_embeddings(model, PROCESSOR, rows, out, SOURCE, shard_images=2) == 4
    folder = read_embeddings(out)
    found = folder.columns["track_id"].tolist()
    assert found == read and [type(value) for value in found] == [type(value) for value in read]
    (out / "shard-00003.safetensors").unlink()
    assert write_embeddings(model, PROCESSOR, rows, out, SOURCE, shard_images=2) == 1  # nothing has changed


def test_shards_that_tell_no_type_of_ids_are_read(model, labelled, tmp_path):
    """As they were written when a shard's images had no ids; NaN stood in them, too."""
    write_embeddings(model, PROCESSOR, labelled, tmp_path, SOURCE, shard_images=2)
    written = {0: [None, None], 1: [4.0, float("nan")], 2: [6, 7], 3: [8]}
    for shard, tracks in written.items():
        file = tmp_path / f"shard-{shard:05d}.parquet"
        parquet.write_table(parquet.read_table(file).append_column("track_id", [tracks]), file)
    assert read_embeddings(tmp_path).columns["track_id"].tolist() == [None, None, 4, None, 6, 7, 8]
    parquet.write_table(parquet.read_table(file).drop("track_id").append_column("track_id", [["a"]]), file)
    with pytest.raises(ValueError, match="ids of its shards differ in type.*Embed it again"):
        read_embeddings(tmp_path)


def test_processes_share_the_shards(model, labelled, embeddings, tmp_path):
    parts = [write_embeddings(model, PROCESSOR, labelled, tmp_path, SOURCE, 2, index, 3) for index in range(3)]
    assert parts == [2, 1, 1]
    assert_same(read_embeddings(tmp_path).embeddings, embeddings)


def test_another_model_or_data_set_is_refused(model, labelled, tmp_path):
    write_embeddings(model, PROCESSOR, labelled, tmp_path, SOURCE)
    torch.manual_seed(1)
    other = PersonViTModel(CONFIG).eval()
    with pytest.raises(ValueError, match="another weights"):
        write_embeddings(other, PROCESSOR, labelled, tmp_path, SOURCE)
    with pytest.raises(ValueError, match="another data, num_images"):
        write_embeddings(model, PROCESSOR, labelled.select(range(3)), tmp_path, {**SOURCE, "data": "e"})
    with pytest.raises(ValueError, match="another model or revision"):
        read_embeddings(tmp_path).require_model(model_fingerprint(other, PROCESSOR))
    read_embeddings(tmp_path).require_model(model_fingerprint(model, PROCESSOR))
    resized = PersonViTImageProcessor(size={"height": 64, "width": 32})
    assert model_fingerprint(model, resized) != model_fingerprint(model, PROCESSOR)


def test_broken_images_are_left_out_of_a_folder(model, paths, embeddings, tmp_path):
    broken = {"bytes": b"no image", "path": "b.jpg"}
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths[:3]] + [broken]},
        datasets.Features({"image": datasets.Image(decode=False)}),
    )
    write_embeddings(model, PROCESSOR, rows, tmp_path, SOURCE, max_broken_share=0.5)
    folder = read_embeddings(tmp_path)
    assert folder.rows.tolist() == [0, 1, 2]
    assert np.abs(folder.embeddings - embeddings[:3]).max() < 1e-6


def broken_model() -> PersonViTModel:
    model = PersonViTModel(CONFIG).eval()
    with torch.no_grad():
        model.layernorm.weight[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: (broken_model(), PROCESSOR), "image 0 .*weights of the model"),
        (
            lambda: (
                PersonViTModel(CONFIG),
                PersonViTImageProcessor(**PROCESSOR.to_dict() | {"image_std": [0.0] * 3}),
            ),
            r"image 0 .*image processor.*image_std .0\.0, 0\.0, 0\.0",
        ),
    ],
    ids=["model", "processor"],
)
def test_features_that_are_no_numbers_are_not_taken_for_broken_images(labelled, arrays, tmp_path, load, message):
    loaded = load()
    with pytest.raises(ValueError, match=message):
        embed_images(*loaded, arrays, max_broken_share=1)
    with pytest.raises(ValueError, match=message):
        write_embeddings(*loaded, labelled, tmp_path / "out", SOURCE, max_broken_share=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_images": 0}, "`shard_images` must be at least 1, got 0"),
        ({"shard_images": -1}, "`shard_images` must be at least 1, got -1"),
        ({"source": {"model": "m"}}, "`source` .*data, split"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"max_broken_share": 2}, "`max_broken_share`"),
    ],
)
def test_bad_settings_leave_nothing_behind(model, labelled, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_embeddings(model, PROCESSOR, labelled, tmp_path / "out", **{"source": SOURCE, **options})
    assert not list(tmp_path.iterdir())
    write_embeddings(model, PROCESSOR, labelled, tmp_path / "out", SOURCE)


def test_a_folder_may_be_read_by_those_who_may_read_other_files(model, labelled, tmp_path, monkeypatch):
    write_embeddings(model, PROCESSOR, labelled, tmp_path, SOURCE)
    (tmp_path / "any").touch()
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "any").stat().st_mode}
    monkeypatch.setattr("os.access", lambda path, mode: path.suffix != ".safetensors")  # tests may run as root
    with pytest.raises(PermissionError, match=r"shard-00000\.safetensors may not be read.*ask its owner"):
        read_embeddings(tmp_path)


def test_a_file_that_may_not_be_read_is_not_damaged(model, labelled, tmp_path, monkeypatch):
    def refuse(file):
        raise PermissionError(13, "Permission denied", str(file))

    write_embeddings(model, PROCESSOR, labelled, tmp_path, SOURCE)
    monkeypatch.setattr(parquet, "ParquetFile", refuse)
    with pytest.raises(PermissionError, match="shard-00000.parquet"):
        read_embeddings(tmp_path)


def test_a_folder_that_can_not_be_written_is_told_before_the_work(model, labelled, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("personvit_hf.embedding.embed_images", None)
    with pytest.raises(NotADirectoryError, match=r"file/g can't be a folder, as .*file is none"):
        write_embeddings(model, PROCESSOR, labelled, tmp_path / "file" / "g", SOURCE)


@pytest.mark.parametrize("name", ["cam:3", "o::x", "s3://bucket", "a b?*[1]"])
def test_names_of_folders_are_no_addresses(model, labelled, embeddings, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_embeddings(model, PROCESSOR, labelled, name, SOURCE, shard_images=4)
    (tmp_path / name / "shard-00001.safetensors").unlink()
    assert write_embeddings(model, PROCESSOR, labelled, Path(name), SOURCE, shard_images=4) == 1
    assert_same(read_embeddings(name).embeddings, embeddings)


def test_shards_without_settings_are_not_taken_over(model, labelled, tmp_path):
    write_embeddings(model, PROCESSOR, labelled, tmp_path, SOURCE)
    (tmp_path / "embeddings.json").unlink()
    with pytest.raises(ValueError, match="shards, but no embeddings.json"):
        write_embeddings(model, PROCESSOR, labelled, tmp_path, SOURCE)


def save_rows(folder, embeddings):
    save_file({"embeddings": embeddings}, folder / "shard-00000.safetensors")


def change_settings(folder, **changes):
    """Sets what is told in embeddings.json, or takes it away."""
    settings = json.loads((folder / "embeddings.json").read_text()) | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    (folder / "embeddings.json").write_text(json.dumps(settings))


SEVEN = {"row": range(7), "name": list("abcdefg")}


def save_table(folder, columns):
    parquet.write_table(Table.from_pydict(columns), folder / "shard-00000.parquet")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "embeddings.json").write_text("{"), "embeddings.json"),
        (lambda folder: (folder / "embeddings.json").write_text(200_000 * "["), "embeddings.json"),
        (lambda folder: (folder / "embeddings.json").write_text('{"format": 1}'), "embeddings.json"),
        (lambda folder: change_settings(folder, model=None), "embeddings.json"),
        (lambda folder: change_settings(folder, data=["d"]), "embeddings.json"),
        (lambda folder: change_settings(folder, split=1), "embeddings.json"),
        (lambda folder: (folder / "shard-00000.safetensors").write_bytes(b"12345678"), "can't be read"),
        (lambda folder: (folder / "shard-00000.parquet").write_bytes(b"PAR1"), "can't be read"),
        (lambda folder: save_rows(folder, np.zeros((2, 32), np.float32)), "fit"),
        (lambda folder: save_rows(folder, np.full((7, 32), np.nan, np.float32)), "NaN"),
        (lambda folder: save_rows(folder, np.full((7, 32), 1e30, np.float32)), "length 1; row 0 has"),
        (lambda folder: save_rows(folder, np.ones((7, 32), np.float64)), "float64, not float32"),
        (lambda folder: save_table(folder, {"row": 10_000 * [0], "name": 10_000 * ["a"]}), "fit"),
        (lambda folder: save_table(folder, {"row": range(7), "name": 7 * [100_000 * "a"]}), "fit"),
        (lambda folder: save_table(folder, {**SEVEN, "person_id": 7 * [b"a"]}), "`person_id` holds binary"),
        (lambda folder: save_table(folder, {**SEVEN, "track_id": 7 * [[1]]}), "`track_id` holds list"),
        (lambda folder: save_table(folder, {**SEVEN, "camera_id": 7 * [date(2020, 1, 1)]}), "`camera_id` holds date"),
        (lambda folder: save_table(folder, {"row": range(1, 8), "name": list("abcdefg")}), "fit"),
        (lambda folder: save_table(folder, {"row": ["0"] * 7, "name": list("abcdefg")}), "fit"),
    ],
)
def test_damaged_folders(model, labelled, tmp_path, damage, message):
    write_embeddings(model, PROCESSOR, labelled, tmp_path, SOURCE)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_embeddings(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="embeddings.json"):
        read_embeddings(tmp_path)


def test_open_pictures_are_read_as_their_files_are(model, tmp_path):
    """16-bit grey is scaled, and the orientation of EXIF is followed."""
    grey = np.random.default_rng(0).integers(0, 2**16, (40, 20)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    turned = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 20, 3), dtype=np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    files = [tmp_path / "grey.png", tmp_path / "turned.png"]
    opened = [Image.open(file) for file in files]
    assert np.array_equal(embed_images(model, PROCESSOR, opened), embed_images(model, PROCESSOR, files))
    assert opened[1].size == (20, 40)  # the caller's own is as it was


def test_arrays_of_other_kinds(model, arrays):
    expected = embed_images(model, PROCESSOR, arrays[:1])
    backwards = np.ascontiguousarray(arrays[0][..., ::-1])[..., ::-1]  # as OpenCV's channels are turned round
    assert np.array_equal(embed_images(model, PROCESSOR, [backwards]), expected)
    for array in (arrays[0] / 255.0, arrays[0].astype(np.uint16), arrays[0][..., 0], arrays[0].transpose(2, 0, 1)):
        with pytest.raises(ValueError, match=r"image 0 must be \(height, width, 3\) of uint8, got"):
            embed_images(model, PROCESSOR, [array])


def test_what_is_no_sequence_of_images(model, paths, arrays):
    for alone in (str(paths[0]), paths[0], paths[0].read_bytes(), Image.open(paths[0])):
        with pytest.raises(ValueError, match=rf"`images` must be a sequence .* {type(alone).__name__} alone: write"):
            embed_images(model, PROCESSOR, alone)
    for images in (torch.zeros(2, 3, 40, 20), [arrays[0], torch.zeros(3, 40, 20)]):
        with pytest.raises(ValueError, match=r"image \d must be a path, .* got Tensor. .*goes to the model"):
            embed_images(model, PROCESSOR, images)


def test_open_pictures_of_other_modes(model, arrays):
    grey = Image.fromarray(arrays[0]).convert("L")
    assert np.array_equal(embed_images(model, PROCESSOR, [grey.convert("I")]), embed_images(model, PROCESSOR, [grey]))
    deep = [Image.fromarray(257 * np.asarray(grey).astype(kind)) for kind in (np.uint16, np.int32)]
    assert [picture.mode for picture in deep] == ["I;16", "I"]
    assert np.array_equal(embed_images(model, PROCESSOR, deep), embed_images(model, PROCESSOR, [grey] * 2))
    for wrong in (65536, -1):
        with pytest.raises(RuntimeError, match=rf"image 0: a picture of mode I with .*{wrong}.*expected 0"):
            embed_images(model, PROCESSOR, [Image.fromarray(np.array([[0, wrong]], np.int32))])
    with pytest.raises(RuntimeError, match="image 0: a picture of mode F .*make it RGB"):
        embed_images(model, PROCESSOR, [grey.convert("F")])


def test_an_open_picture_that_is_cut_off_is_a_broken_image(model):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 20, 3), dtype=np.uint8)).save(content, "PNG")
    picture = Image.open(io.BytesIO(content.getvalue()[:-500]))
    with pytest.raises(RuntimeError, match="image 0"):
        embed_images(model, PROCESSOR, [picture])
