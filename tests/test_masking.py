from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from personvit_hf import masking
from personvit_hf.augmentation import MultiCrop
from personvit_hf.masking import BlockMasking, PretrainingCrops, block_mask
from personvit_hf.person_images import BrokenImage

GOLDEN = Path(__file__).parent / "golden"
STATISTICS = json.loads((GOLDEN / "block_masks.json").read_text())["statistics"]
EXPECTED = load_file(GOLDEN / "block_masks.safetensors")
GRID = (16, 8)


@pytest.fixture(scope="module", params=["mix", "fixed"])
def sample(request):
    """As many masks of one preset as the reference drew, with the shapes of their blocks."""
    settings = STATISTICS[request.param]
    draw = BlockMasking(GRID, tuple(settings["pred_ratio"]), tuple(settings["pred_ratio_var"]))
    rng = np.random.default_rng(20240611)
    draw_block, shapes, masks, blocks = masking._draw_block, [], [], []

    def recorded(*args):
        block = draw_block(*args)
        shapes.extend([] if block is None else [block.shape])
        return block

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "_draw_block", recorded)
        for _ in range(settings["draws"]):
            before = len(shapes)
            masks.append(draw(rng))
            blocks.append(len(shapes) - before)
    expected = {k.partition(".")[2]: v for k, v in EXPECTED.items() if k.startswith(request.param)}
    return settings, expected, np.stack(masks), np.array(blocks), np.array(shapes)


def assert_same_mean(ours: np.ndarray, histogram: np.ndarray) -> None:
    """Means of two samples, the second one as a histogram of integers, at four standard errors of both."""
    values, count = np.arange(len(histogram)), histogram.sum()
    mean = (values * histogram).sum() / count
    variance = ((values - mean) ** 2 * histogram).sum() / count
    assert abs(ours.mean() - mean) <= 4 * math.sqrt(ours.var() / len(ours) + variance / count)


def assert_same_frequencies(ours: np.ndarray, theirs: np.ndarray, draws: tuple[int, int]) -> None:
    """Shares of two samples of independent draws, at four standard errors of both."""
    pooled = (ours * draws[0] + theirs * draws[1]) / sum(draws)
    assert np.all(np.abs(ours - theirs) <= 4 * np.sqrt(pooled * (1 - pooled) * (1 / draws[0] + 1 / draws[1])))


def test_share_of_masked_patches(sample):
    settings, expected, masks, _, _ = sample
    counts, n = masks.sum((1, 2)), len(masks)
    assert_same_mean(counts, expected["count_histogram"])
    assert_same_mean(counts[counts > 0], np.concatenate([[0], expected["count_histogram"][1:]]))
    # Distribution functions, which hold every quantile.
    ours, theirs = np.bincount(counts, minlength=129).cumsum() / n, expected["count_histogram"].cumsum() / n
    assert_same_frequencies(ours, theirs, (n, n))


def test_each_position_is_masked_as_often(sample):
    _, expected, masks, _, _ = sample
    assert_same_frequencies(masks.mean(0), expected["position_frequency"], (len(masks), len(masks)))


def test_number_and_size_of_blocks(sample):
    settings, expected, masks, blocks, shapes = sample
    assert_same_mean(blocks, expected["blocks_histogram"])
    found = np.bincount(blocks, minlength=64)[:64] / len(masks)
    assert_same_frequencies(found, expected["blocks_histogram"] / len(masks), (len(masks), len(masks)))
    for side, name in enumerate(("block_height_histogram", "block_width_histogram")):
        assert_same_mean(shapes[:, side], expected[name])
        assert shapes[:, side].max() < GRID[side]
    assert blocks.max() <= settings["max_blocks"] + 4


@given(
    rows=st.integers(2, 20),
    columns=st.integers(2, 20),
    share=st.floats(0, 1),
    aspect=st.floats(0.05, 1),
    seed=st.integers(0, 2**32),
)
def test_masks_never_exceed_what_was_asked_for(rows, columns, share, aspect, seed):
    num_masked = share * rows * columns
    mask = block_mask((rows, columns), num_masked, np.random.default_rng(seed), aspect)
    assert mask.shape == (rows, columns) and mask.dtype == bool
    assert mask.sum() <= num_masked
    assert np.array_equal(mask, block_mask((rows, columns), num_masked, np.random.default_rng(seed), aspect))


@given(
    grid=st.sampled_from([(16, 8), (8, 4), (4, 2), (2, 2)]),
    ratio=st.floats(0.2, 0.7),
    spread=st.floats(0, 0.2),
    seed=st.integers(0, 2**32),
)
def test_ratios_stay_within_their_spread(grid, ratio, spread, seed):
    draw = BlockMasking(grid, (ratio,), (spread,))
    mask = draw(np.random.default_rng(seed))
    assert mask.sum() <= (ratio + spread) * mask.size
    assert np.array_equal(mask, draw(np.random.default_rng(seed)))


@pytest.mark.parametrize("grid", [(8, 4), (4, 2)])
def test_small_grids_are_masked_too(grid):
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask(grid, grid[0] * grid[1] // 2, rng) for _ in range(500)])
    assert masks.mean() > 0.45
    assert masks.mean(0).min() > 0.15 and masks.mean(0).max() < 0.85


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: block_mask((1, 8), 2, np.random.default_rng(0)), r"2 rows and 2 columns.*\(1, 8\)"),
        (lambda: block_mask((4, 4), 17, np.random.default_rng(0)), r"\[0, 16\] on a 4x4 grid; got 17"),
        (lambda: block_mask((4, 4), -1, np.random.default_rng(0)), "got -1"),
        (lambda: block_mask((4, 4), 2, np.random.default_rng(0), min_aspect=2.0), "`min_aspect`.*2.0"),
        (lambda: BlockMasking((16, 1)), r"\(16, 1\)"),
        (lambda: BlockMasking((4, 4), ratios=(0.3,)), "one entry each"),
        (lambda: BlockMasking((4, 4), ratios=(), ratio_spreads=()), "one entry each"),
        (lambda: BlockMasking((4, 4), ratios=(0.9,), ratio_spreads=(0.2,)), "0.9 with a spread of 0.2"),
        (lambda: BlockMasking((4, 4), ratios=(0.1,), ratio_spreads=(0.2,)), "0.1 with a spread of 0.2"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_views_of_an_image_follow_from_seed_epoch_and_index():
    images = [np.full((40, 20, 3), 40 * i, np.uint8) for i in range(2)] + [BrokenImage("c.jpg", "cut short")]
    augment = MultiCrop(global_size=(32, 16), local_size=(16, 8), num_local_crops=3)

    def crops(seed: int) -> PretrainingCrops:
        return PretrainingCrops(images, augment, BlockMasking(grid=(4, 2)), seed)

    first = crops(0)[1]
    assert {name: (value.shape, value.dtype) for name, value in first.items()} == {
        "global_pixel_values": ((2, 3, 32, 16), np.uint8),
        "local_pixel_values": ((3, 3, 16, 8), np.uint8),
        "bool_masked_pos": ((2, 8), bool),
    }
    for name, value in crops(0)[1].items():
        np.testing.assert_array_equal(value, first[name])
    for other in (crops(0)[len(images) + 1], crops(1)[1]):  # the next epoch's, and another seed's
        assert not np.array_equal(other["global_pixel_values"], first["global_pixel_values"])
    assert crops(0)[2] is images[2]
    unmasked = PretrainingCrops(images, augment, BlockMasking((4, 2), (0.0, 0.0), (0.0, 0.0)), 0)[1]
    assert set(unmasked) == {"global_pixel_values", "local_pixel_values"}
    np.testing.assert_array_equal(unmasked["local_pixel_values"], first["local_pixel_values"])
