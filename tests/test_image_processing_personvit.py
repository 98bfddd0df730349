from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_fixtures import assert_within, load_golden
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize
from transformers import AutoImageProcessor

from personvit_hf import PersonViTConfig, PersonViTImageProcessor
from personvit_hf.image_processing_personvit import PersonViTImageProcessorPil

EXPECTED, FACTS = load_golden("reid_preprocess")
TOLERANCE = FACTS["tolerance"]["abs"]
NUMBERS = range(4)
HEIGHT, WIDTH = FACTS["config"]["size_test"]

both_backends = pytest.mark.parametrize("backend", [PersonViTImageProcessor, PersonViTImageProcessorPil])


def official(backend, **settings):
    """The processor of the official fine-tuning's test images."""
    statistics = {"image_mean": FACTS["config"]["mean"], "image_std": FACTS["config"]["std"]}
    return backend(size={"height": HEIGHT, "width": WIDTH}, **statistics | settings)


def inputs(number: int) -> dict:
    """One picture as everything that people have it as."""
    array = EXPECTED[f"image{number}"].numpy()
    return {
        "picture": Image.fromarray(array),
        "array": array,
        "array, channels first": np.ascontiguousarray(array.transpose(2, 0, 1)),
        "tensor": torch.from_numpy(array).permute(2, 0, 1),
    }


@both_backends
@pytest.mark.parametrize("kind", list(inputs(0)))
@pytest.mark.parametrize("number", NUMBERS)
def test_pixel_values_equal_the_official_ones(backend, kind, number):
    pixel_values = official(backend)(inputs(number)[kind], return_tensors="pt")["pixel_values"]
    assert pixel_values.dtype == torch.float32
    assert_within(TOLERANCE, pixel_values, EXPECTED[f"pixel_values{number}"][None])


@both_backends
@pytest.mark.parametrize("kind", list(inputs(0)))
def test_batches_of_different_sizes(backend, kind):
    batch = [inputs(number)[kind] for number in (*NUMBERS, 1)]
    assert len({np.shape(picture) for picture in batch} if kind != "picture" else {one.size for one in batch}) > 1
    pixel_values = official(backend)(batch, return_tensors="pt")["pixel_values"]
    expected = torch.stack([EXPECTED[f"pixel_values{number}"] for number in (*NUMBERS, 1)])
    assert_within(TOLERANCE, pixel_values, expected)


def test_a_batch_of_one_size_keeps_its_order():
    crops = torch.randint(0, 256, (5, 3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = official(PersonViTImageProcessor)
    together = processor(crops, return_tensors="pt")["pixel_values"]
    one_by_one = [processor(crop, return_tensors="pt")["pixel_values"] for crop in crops]
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=0, atol=0)


@both_backends
def test_grey_and_transparent_pictures_become_three_channels(backend):
    picture = inputs(0)["picture"]
    grey = picture.convert("L")
    processor = official(backend)
    pixel_values = processor([grey, picture.convert("RGBA"), picture], return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (3, 3, HEIGHT, WIDTH)
    assert torch.equal(pixel_values[0, 0], pixel_values[0, 2])
    assert torch.equal(pixel_values[1], pixel_values[2])


@both_backends
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_channels_do_not_depend_on_each_other(backend, channels):
    """Four are no colour and its transparency: infrared, depth or a mask."""
    image = np.random.default_rng(0).integers(0, 256, (60, 30, channels), dtype=np.uint8)
    settings = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels, "do_convert_rgb": False}
    processor = official(backend, **settings)
    pixel_values = processor(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, channels, HEIGHT, WIDTH)
    for channel in range(channels):
        grey = np.repeat(image[..., channel, None], 3, axis=-1)
        expected = official(backend, image_mean=[0.5] * 3, image_std=[0.5] * 3)(grey, return_tensors="pt")
        assert_within(TOLERANCE, pixel_values[0, channel], expected["pixel_values"][0, 0])


@both_backends
def test_interpolation_may_be_named_by_torchvision(backend):
    picture, processor = inputs(0)["picture"], official(backend)
    by_pil, by_torchvision = (
        processor(picture, resample=kind, return_tensors="pt")["pixel_values"]
        for kind in (Image.Resampling.BICUBIC, InterpolationMode.BICUBIC)
    )
    assert torch.equal(by_pil, by_torchvision)
    assert not torch.equal(by_pil, processor(picture, return_tensors="pt")["pixel_values"])


def test_torchvision_s_own_nearest_has_no_name_in_pil():
    kind = InterpolationMode.NEAREST
    pixel_values = official(PersonViTImageProcessor)(inputs(0)["picture"], resample=kind, return_tensors="pt")
    resized = resize(inputs(0)["tensor"], (HEIGHT, WIDTH), kind) / 255
    assert_within(1e-5, pixel_values["pixel_values"][0], resized * 2 - 1)


@both_backends
def test_default_statistics_and_size_are_those_of_pretraining(backend):
    white = np.full((30, 20, 3), 255, dtype=np.uint8)
    pixel_values = backend()(white, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 256, 128)
    imagenet = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert_within(1e-5, pixel_values, imagenet[None, :, None, None].expand(1, 3, 256, 128))


@both_backends
def test_aspect_ratio_is_not_kept(backend):
    """The left half stays the left half, however wide the crop was."""
    crop = np.zeros((32, 96, 3), dtype=np.uint8)
    crop[:, 48:] = 255
    pixel_values = official(backend)(crop, return_tensors="pt")["pixel_values"]
    assert (pixel_values[..., : WIDTH // 2 - 2] == -1).all()
    assert (pixel_values[..., WIDTH // 2 + 2 :] == 1).all()


def test_saved_statistics_come_back(tmp_path):
    processor = official(PersonViTImageProcessor, image_mean=[0.1, 0.2, 0.3])
    PersonViTConfig().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    picture = inputs(1)["picture"]
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    for auto, backend in (
        (AutoImageProcessor.from_pretrained(tmp_path), PersonViTImageProcessor),
        (AutoImageProcessor.from_pretrained(tmp_path, backend="pil"), PersonViTImageProcessorPil),
    ):
        assert type(auto) is backend
        assert_within(TOLERANCE, auto(picture, return_tensors="pt")["pixel_values"], expected)


def test_floats_are_resized_too():
    """Pictures that were scaled to [0, 1] before; torchvision's kernel is a grey level off at most."""
    image = EXPECTED["image0"].permute(2, 0, 1) / 255
    pixel_values = official(PersonViTImageProcessor, do_rescale=False)(image, return_tensors="pt")["pixel_values"]
    assert_within(2 / 255, pixel_values, EXPECTED["pixel_values0"][None])
