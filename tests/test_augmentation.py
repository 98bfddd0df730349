from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from personvit_hf import augmentation
from personvit_hf.augmentation import MultiCrop, ReIDTransform, draw_crop_box, normalize, resize


def picture(height=256, width=128, seed=0):
    """A smooth picture that uses the whole range of each channel."""
    noise = np.random.default_rng(seed).random((8, 5, 3), dtype=np.float32)
    smooth = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth * 320 - 32, 0, 255).astype(np.uint8)


def by_torchvision(function, image, *args):
    return function(torch.from_numpy(image).permute(2, 0, 1), *args).permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.6, 0.95, 1.0, 1.4])
def test_colour_adjustments_are_within_one_level_of_torchvision(kind, factor):
    image = picture()
    ours = getattr(augmentation, f"adjust_{kind}")(image, factor).astype(int)
    assert np.abs(ours - by_torchvision(getattr(reference, f"adjust_{kind}"), image, factor)).max() <= 1


@pytest.mark.parametrize("factor", [-0.5, -0.1, -0.03, 0.0, 0.05, 0.1, 0.5])
def test_hue_is_near_torchvision(factor):
    # A step of uint8 hue is six levels of a saturated colour; PIL's result, also by uint8, is further from the exact.
    image = picture()
    exact = by_torchvision(reference.adjust_hue, image, factor)
    error = np.abs(augmentation.adjust_hue(image, factor) - exact)
    assert error.mean() < 0.6
    assert np.percentile(error, 99) <= 4
    assert error.max() <= 8
    signed = (augmentation.adjust_hue(image, factor).astype(int) - exact).mean()
    assert abs(signed) < 0.3


def test_grey_and_solarized_pictures_equal_torchvision():
    image = picture()
    grey = by_torchvision(reference.rgb_to_grayscale, image)
    assert np.abs(augmentation.adjust_saturation(image, 0.0) - grey).max() <= 1
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    np.testing.assert_array_equal(augmentation.solarize(levels), by_torchvision(reference.solarize, levels, 128))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_equals_the_exact_gaussian(sigma):
    image = picture()
    size = [2 * math.ceil(3 * sigma) + 1] * 2
    exact = reference.gaussian_blur(torch.from_numpy(image).permute(2, 0, 1).double(), size, [sigma] * 2)
    error = augmentation.gaussian_blur(image, sigma) - exact.permute(1, 2, 0).numpy()
    assert np.abs(error).max() <= 1
    assert abs(error.mean()) < 0.05


@pytest.mark.parametrize(
    ("height", "width", "limit"), [(60, 30, 1.0), (140, 70, 0.5), (300, 150, 1.0), (700, 300, 1.0)]
)
def test_resize_is_near_the_antialiased_bicubic_one(height, width, limit):
    image = picture(height, width)
    ours = resize(image, (128, 64))
    exact = np.array(Image.fromarray(image).resize((64, 128), Image.Resampling.BICUBIC)).astype(int)
    assert ours.shape == exact.shape
    assert np.abs(ours - exact).mean() < limit


@pytest.mark.parametrize(
    ("height", "width"), [(230, 64), (230, 80), (320, 60), (400, 32), (256, 64), (384, 63), (60, 130), (2, 900)]
)
def test_resize_does_not_alias_what_shrinks_along_one_axis(height, width):
    """Aliased noise is off by 22 and more."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exact = np.array(Image.fromarray(image).resize((64, 128), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(resize(image, (128, 64)) - exact).mean() < 12


@pytest.mark.parametrize(
    ("height", "width", "interpolation"),
    [(128, 64, "CUBIC"), (90, 40, "CUBIC"), (202, 101, "CUBIC"), (203, 102, "AREA"), (300, 130, "AREA")],
)
def test_resize_takes_one_step_where_both_axes_change_alike(height, width, interpolation):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    once = cv2.resize(image, (64, 128), interpolation=getattr(cv2, f"INTER_{interpolation}"))
    np.testing.assert_array_equal(resize(image, (128, 64)), once)


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("shape", [(256, 128), (300, 90), (64, 64), (31, 17)])
def test_crop_geometry_equals_torchvision(scale, shape):
    ratio, draws = (3 / 8, 2 / 3), 4000
    rng = np.random.default_rng(0)
    ours = np.array([draw_crop_box(*shape, scale, ratio, rng.random) for _ in range(draws)], dtype=float)
    torch.manual_seed(0)
    blank = torch.empty(3, *shape)
    theirs = np.array([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(draws)], dtype=float)

    def statistics(boxes):
        top, left, height, width = boxes.T
        return np.stack([top, left, height, width, height * width, width / height, (height * width) ** 2], 1)

    a, b = statistics(ours), statistics(theirs)
    assert np.all(np.abs(a.mean(0) - b.mean(0)) <= 4 * np.sqrt((a.var(0) + b.var(0)) / draws) + 1e-9)


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    low=st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)
def test_crops_lie_within_the_picture(height, width, low, seed):
    top, left, h, w = draw_crop_box(height, width, (low, 1.0), (3 / 8, 2 / 3), np.random.default_rng(seed).random)
    assert 0 <= top and 0 <= left and h >= 1 and w >= 1
    assert top + h <= height and left + w <= width


@pytest.mark.parametrize("shape", [(400, 20), (20, 400), (401, 33), (33, 401)])
def test_pictures_of_extreme_shape_fall_back_to_torchvisions_centred_crop(shape):
    scale, ratio = (0.9, 1.0), (3 / 8, 2 / 3)  # no rectangle of these fits
    expected = RandomResizedCrop.get_params(torch.empty(3, *shape), scale, ratio)
    assert draw_crop_box(*shape, scale, ratio, np.random.default_rng(0).random) == tuple(expected)


@pytest.mark.parametrize("shape", [(256, 128), (57, 18), (1, 1), (900, 300)])
def test_multi_crop_shapes_and_determinism(shape):
    crop, image = MultiCrop(), picture(*shape)
    before = image.copy()
    first, local = crop(image, np.random.default_rng([3, 1, 4]))
    assert (first.shape, local.shape) == ((2, 3, 256, 128), (8, 3, 128, 64))
    assert first.dtype == local.dtype == np.uint8
    again = crop(image, np.random.default_rng([3, 1, 4]))
    np.testing.assert_array_equal(first, again[0])
    np.testing.assert_array_equal(local, again[1])
    np.testing.assert_array_equal(image, before)
    if shape != (1, 1):
        assert not np.array_equal(first, crop(image, np.random.default_rng([3, 2, 4]))[0])


def test_sizes_and_number_of_crops_are_arguments():
    crops = MultiCrop(global_size=(128, 64), local_size=(96, 48), num_local_crops=0)(
        picture(), np.random.default_rng(0)
    )
    assert [c.shape for c in crops] == [(2, 3, 128, 64), (0, 3, 96, 48)]


PLAIN = {
    "global_scale": (1.0, 1.0),
    "local_scale": (1.0, 1.0),
    "aspect_ratio": (0.5, 0.5),
    "flip_probability": 0.0,
    "jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probabilities": (0.0, 0.0, 0.0),
    "solarize_probability": 0.0,
    "num_local_crops": 4,
}


def test_each_extra_changes_only_its_own_crops():
    image = picture()
    planes = image.transpose(2, 0, 1)

    def draw(**changes):
        return MultiCrop(**{**PLAIN, **changes})(image, np.random.default_rng(0))

    plain, local = draw()
    np.testing.assert_array_equal(plain, [planes, planes])
    np.testing.assert_array_equal(draw(flip_probability=1.0)[0], plain[..., ::-1])
    np.testing.assert_array_equal(draw(solarize_probability=1.0)[0], [planes, np.minimum(planes, 255 - planes)])
    np.testing.assert_array_equal(draw(solarize_probability=1.0)[1], local)
    grey = draw(grayscale_probability=1.0)[0]
    assert np.all(grey == grey[:, :1]) and grey.std() > 5
    for place in range(3):
        probabilities = tuple(float(i == place) for i in range(3))
        blurred, blurred_local = draw(blur_probabilities=probabilities, blur_sigma=(2.0, 2.0))
        changed = [not np.array_equal(blurred[i], planes) for i in (0, 1)]
        changed.append(not np.array_equal(blurred_local, local))
        assert changed == [i == place for i in range(3)]


@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation", "hue"])
def test_jitter_draws_each_factor_uniformly_and_in_random_order(kind, monkeypatch):
    calls = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(
            augmentation, f"adjust_{name}", lambda image, factor, name=name: (calls.append((name, factor)), image)[1]
        )
    crop = MultiCrop(global_size=(4, 2), local_size=(4, 2), grayscale_probability=0.0, num_local_crops=0)
    rng = np.random.default_rng(0)
    for _ in range(1500):
        crop(picture(8, 4), rng)
    share = len(calls) / 4 / 3000
    assert abs(share - 0.8) <= 4 * math.sqrt(0.8 * 0.2 / 3000)
    spread = getattr(crop, kind)
    factors = np.array([factor for name, factor in calls if name == kind]) - (kind != "hue")
    assert np.abs(factors).max() <= spread
    assert abs(factors.mean()) <= 4 * spread / math.sqrt(3 * len(factors))
    assert abs((factors**2).mean() - spread**2 / 3) <= 4 * spread**2 * math.sqrt(4 / 45 / len(factors))
    places = np.bincount([i % 4 for i, (name, _) in enumerate(calls) if name == kind], minlength=4) / len(factors)
    assert np.all(np.abs(places - 0.25) <= 4 * math.sqrt(0.25 * 0.75 / len(factors)))


def test_reid_transform_without_randomness_resizes_and_normalises():
    image = picture(100, 60)
    transform = ReIDTransform(
        flip_probability=0, padding=0, erasing_probability=0, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.5)
    )
    pixels = transform(image, np.random.default_rng(0))
    planes = torch.from_numpy(resize(image, (256, 128))).permute(2, 0, 1)
    expected = normalize(planes, (0.4, 0.5, 0.6), (0.2, 0.3, 0.5))
    assert pixels.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(pixels), expected, rtol=0, atol=2e-6)
    flipped = ReIDTransform(flip_probability=1, padding=0, erasing_probability=0)(image, np.random.default_rng(0))
    np.testing.assert_allclose(flipped[..., ::-1] * 0.5 + 0.5, planes.numpy() / 255, atol=1e-6)


def test_reid_padding_shifts_the_picture_and_shows_black():
    transform = ReIDTransform(size=(20, 12), flip_probability=0, padding=3, erasing_probability=0)
    image = picture(20, 12) // 2 + 100
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0))).transpose(2, 0, 1) / 127.5 - 1
    windows = {(top, left): padded[:, top : top + 20, left : left + 12] for top in range(7) for left in range(7)}
    rng, seen = np.random.default_rng(0), set()
    for _ in range(600):
        pixels = transform(image, rng)
        matches = [offset for offset, window in windows.items() if np.allclose(pixels, window, atol=1e-5)]
        assert len(matches) == 1
        seen.update(matches)
    assert seen == set(windows)


def test_erasing_puts_normal_noise_into_one_rectangle():
    transform = ReIDTransform(size=(64, 32), flip_probability=0, padding=0)
    image = np.full((64, 32, 3), 255, np.uint8)  # normalised: 1.0
    rng = np.random.default_rng(0)
    draws, areas, aspects, noise = 1000, [], [], []
    for _ in range(draws):
        pixels = transform(image, rng)
        erased = np.any(np.abs(pixels - 1) > 1e-5, axis=0)
        if not erased.any():
            continue
        rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
        box = pixels[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert erased.sum() == box[0].size  # a full rectangle
        areas.append(erased.sum() / erased.size)
        aspects.append(box.shape[1] / box.shape[2])
        noise.append(box.ravel())
    assert abs(len(areas) / draws - 0.5) <= 4 * math.sqrt(0.25 / draws)
    values = np.concatenate(noise)
    assert abs(values.mean()) <= 4 / math.sqrt(len(values))
    assert abs(values.var() - 1) <= 4 * math.sqrt(2 / len(values))
    assert 0.015 < min(areas) < 0.04 and 0.25 < max(areas) <= 0.36
    assert min(aspects) < 0.6 and max(aspects) > 2.0


def test_reid_transform_depends_on_its_generator_alone():
    transform, image = ReIDTransform(), picture(70, 30)
    first, again, other = (transform(image, np.random.default_rng([0, 1, index])) for index in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (3, 256, 128)


def test_normalize_equals_torchvision():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 4, 3, 8, 6), dtype=np.uint8))
    expected = reference.normalize(pixels.float() / 255, mean, std)
    torch.testing.assert_close(normalize(pixels, mean, std), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="must be uint8.*float32"):
        normalize(pixels.float(), mean, std)


@pytest.mark.parametrize("transform", [MultiCrop(), ReIDTransform()])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 4), np.uint8), r"RGB array.*got uint8 \(8, 4\)"),
        (np.zeros((8, 4, 4), np.uint8), r"got uint8 \(8, 4, 4\)"),
        (np.zeros((8, 4, 3), np.float32), r"got float32"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (Image.new("RGB", (4, 8)), "got Image"),
    ],
)
def test_bad_pictures_are_named(transform, image, message):
    with pytest.raises(ValueError, match=message):
        transform(image, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("transform", "field", "value"),
    [
        (MultiCrop, "global_size", (256, 0)),
        (MultiCrop, "local_size", (128,)),
        (MultiCrop, "local_size", (96.5, 48)),
        (MultiCrop, "num_local_crops", -1),
        (MultiCrop, "global_scale", (0.0, 1.0)),
        (MultiCrop, "global_scale", (0.4, 1.1)),
        (MultiCrop, "local_scale", (0.4, 0.05)),
        (MultiCrop, "aspect_ratio", (-0.5, 0.5)),
        (MultiCrop, "flip_probability", 1.5),
        (MultiCrop, "solarize_probability", -0.1),
        (MultiCrop, "blur_probabilities", (1.0, 0.1)),
        (MultiCrop, "blur_probabilities", (1.0, 0.1, 2.0)),
        (MultiCrop, "blur_sigma", (0.0, 2.0)),
        (MultiCrop, "brightness", 1.2),
        (MultiCrop, "hue", 0.6),
        (ReIDTransform, "size", (256, -128)),
        (ReIDTransform, "padding", -1),
        (ReIDTransform, "erasing_probability", 2.0),
        (ReIDTransform, "erasing_area", (0.5, 0.1)),
        (ReIDTransform, "erasing_min_aspect", 0.0),
        (ReIDTransform, "std", (0.5, 0.0, 0.5)),
        (ReIDTransform, "mean", (0.5,)),
    ],
)
def test_bad_fields_are_named(transform, field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        transform(**{field: value})
