import io
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from personvit_hf import PersonViTConfig, PersonViTForReID, PersonViTImageProcessor, PersonViTModel, embed_images

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


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batch_size_does_not_matter(model, arrays, embeddings, batch_size):
    again = embed_images(model, PROCESSOR, arrays, batch_size=batch_size)
    assert np.abs(again - embeddings).max() < 1e-6


def test_workers_do_not_matter(model, paths, embeddings):
    assert np.array_equal(embed_images(model, PROCESSOR, paths, num_workers=1), embeddings)


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
