"""Block-wise masks for masked image modelling, on a patch grid of any shape, and pre-training's views with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from .augmentation import MultiCrop
from .person_images import BrokenImage, PersonImages

ATTEMPTS_PER_BLOCK = 10


def block_mask(
    grid: tuple[int, int], num_masked: float, rng: np.random.Generator, min_aspect: float = 0.3
) -> np.ndarray:
    """Mask of rectangular blocks that together cover at most `num_masked` patches.

    Blocks may overlap. One that would mask nothing new or too much, or that is not narrower and lower than the grid,
    is drawn again up to ten times; then the mask ends, so it may hold a few patches less than asked for.

    Args:
        grid: (rows, columns) of patches, each at least 2.
        num_masked: Largest number of masked patches. A fraction beyond a whole number masks nothing, but lets blocks
            be drawn a little larger (as in the reference, where the number is ratio * patches).
        rng: Source of randomness.
        min_aspect: Smallest height / width of a block; the largest is its inverse.

    Returns:
        Boolean (rows, columns), True where a patch is masked.

    Raises:
        ValueError: If the grid is a single row or column, `num_masked` is outside [0, rows * columns] or `min_aspect`
            outside (0, 1].

    Source: `ImageFolderMask.__getitem__` of iBOT, `loader.py`; BEiT, arXiv 2106.08254, algorithm 1.
    """
    _check_grid(grid, min_aspect)
    rows, columns = grid
    if not 0 <= num_masked <= rows * columns:
        raise ValueError(
            f"`num_masked` must lie in [0, {rows * columns}] on a {rows}x{columns} grid; got {num_masked}."
        )
    mask = np.zeros((rows, columns), dtype=bool)
    while num_masked >= 1:
        block = _draw_block(mask, num_masked, rng, -math.log(min_aspect))
        if block is None:
            break
        num_masked -= block.size - np.count_nonzero(block)
        block[...] = True
    return mask


def _draw_block(mask: np.ndarray, remaining: float, rng: np.random.Generator, log_aspect: float) -> np.ndarray | None:
    """View of `mask` on a random block with 1 to `remaining` patches that are not yet masked, or None."""
    rows, columns = mask.shape
    smallest = max((min(rows, columns) // 3) ** 2, 1)
    for _ in range(ATTEMPTS_PER_BLOCK):
        # Where fewer patches than `smallest` remain, this draws from [remaining, smallest], as the reference does.
        area = smallest + (remaining - smallest) * rng.random()
        aspect = math.exp(log_aspect * (2 * rng.random() - 1))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = int((rows - height + 1) * rng.random()), int((columns - width + 1) * rng.random())
        block = mask[top : top + height, left : left + width]
        if 0 < block.size - np.count_nonzero(block) <= remaining:
            return block
    return None


@dataclass(frozen=True)
class BlockMasking:
    """Block masks whose share of masked patches varies from crop to crop.

    Each call takes one entry of `ratios` at random and draws the crop's ratio uniformly within its spread. By default
    half of the crops have no mask, and the others a ratio from 0.1 to 0.5.

    Args:
        grid: (rows, columns) of patches, each at least 2.
        ratios: Middle ratios of masked patches, one of which is drawn for each crop.
        ratio_spreads: Half width of the interval around each ratio.
        min_aspect: Smallest height / width of a block; the largest is its inverse.

    Raises:
        ValueError: If lengths differ, a ratio with its spread leaves [0, 1], the grid is a single row or column, or
            `min_aspect` lies outside (0, 1].

    Source: `ImageFolderMask.get_pred_ratio` of iBOT, `loader.py`, `pred_ratio` 0 0.3 and `pred_ratio_var` 0 0.2.
    """

    grid: tuple[int, int]
    ratios: tuple[float, ...] = (0.0, 0.3)
    ratio_spreads: tuple[float, ...] = (0.0, 0.2)
    min_aspect: float = 0.3

    def __post_init__(self) -> None:
        _check_grid(self.grid, self.min_aspect)
        if not self.ratios or len(self.ratios) != len(self.ratio_spreads):
            raise ValueError(
                f"`ratios` and `ratio_spreads` must have one entry each for every ratio; got {self.ratios} and "
                f"{self.ratio_spreads}."
            )
        for ratio, spread in zip(self.ratios, self.ratio_spreads, strict=True):
            if spread < 0 or ratio - spread < 0 or ratio + spread > 1:
                raise ValueError(f"A mask ratio must stay within [0, 1]; got {ratio} with a spread of {spread}.")

    @property
    def masks_something(self) -> bool:
        """Whether any ratio is above 0."""
        return any(self.ratios) or any(self.ratio_spreads)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        """Draw one mask: boolean (rows, columns), True where a patch is masked."""
        entry = int(len(self.ratios) * rng.random())
        ratio = self.ratios[entry] + self.ratio_spreads[entry] * (2 * rng.random() - 1)
        return block_mask(self.grid, ratio * self.grid[0] * self.grid[1], rng, self.min_aspect)


def _check_grid(grid: tuple[int, int], min_aspect: float) -> None:
    if len(grid) != 2 or min(grid) < 2:
        raise ValueError(f"Block masks need a grid of at least 2 rows and 2 columns of patches; got {tuple(grid)}.")
    if not 0 < min_aspect <= 1:
        raise ValueError(f"`min_aspect` must lie in (0, 1]; got {min_aspect}.")


def draw_views(augment: MultiCrop, masking: BlockMasking, image: np.ndarray, rng: np.random.Generator) -> dict:
    """Crops of a picture, uint8 (height, width, 3) RGB, and a mask for each global one: what pre-training takes.

    Returns:
        `global_pixel_values` and `local_pixel_values` as `augment` gives them, and `bool_masked_pos`, bool (global
        crops, patches), unless all mask ratios are 0: without masks the model computes less.
    """
    global_crops, local_crops = augment(image, rng)
    views = {"global_pixel_values": global_crops, "local_pixel_values": local_crops}
    if masking.masks_something:
        views["bool_masked_pos"] = np.stack([masking(rng).ravel() for _ in global_crops])
    return views


class PretrainingCrops(Dataset):
    """Views of image `index` in epoch `epoch`, by key = epoch * number of images + index.

    Args:
        images: The pictures.
        augment: Cuts the crops.
        masking: Draws the masks.
        seed: What is drawn for an image follows from seed, epoch and index.
    """

    def __init__(self, images: PersonImages, augment: MultiCrop, masking: BlockMasking, seed: int):
        self.images, self.augment, self.masking, self.seed = images, augment, masking, seed

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, key: int) -> dict[str, np.ndarray] | BrokenImage:
        """What `draw_views` returns."""
        epoch, index = divmod(key, len(self.images))
        image = self.images[index]
        if isinstance(image, BrokenImage):
            return image
        return draw_views(self.augment, self.masking, image, np.random.default_rng([self.seed, epoch, index]))
