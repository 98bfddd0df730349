"""Random crops and colours for tall pictures of people: multi-crop for pre-training, and ReID fine-tuning's transform.

Pictures are uint8 RGB arrays (height, width, 3), worked on by OpenCV; every random draw comes from the numpy Generator
that is passed in. A transform's call switches OpenCV's own threads off in its process: data loading is parallel by
workers, and more threads within each would only compete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import cv2
import numpy as np
import torch

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in PIL and torchvision
CROP_ATTEMPTS = 10
ERASING_ATTEMPTS = 10
MOST_BICUBIC_SHRINKAGE = math.sqrt(2.5)
DRAWS_PER_CROP = 2 * CROP_ATTEMPTS + 20  # at most: ten rectangles, their place, and fewer than 20 for the colours

# Made once: small numpy calls for each of ten crops would cost as much as the pixels.
_TO_GREY = np.tile(LUMA, (3, 1))
_FROM_GREY = np.eye(3) - _TO_GREY
_JITTER_ORDERS = tuple(permutations(range(4)))
# Row k turns the hue by k / HUE_STEPS of a circle, which OpenCV cuts in 256 on the way to HSV, in 255 on the way back.
HUE_STEPS = 4 * 255
_HUE_TURNS = (np.rint(np.arange(256) * (255 / 256) + np.arange(HUE_STEPS)[:, None] / 4) % 255).astype(np.uint8)


@dataclass(frozen=True)
class MultiCrop:
    """Two global and several local crops of one picture, each with its own colours: DINO's recipe for tall pictures.

    DINO draws a crop's width / height from (3/4, 4/3) and resizes it to a square, so shapes change by a third at most.
    The default here, (3/8, 2/3), is that range around the 1:2 of the crops, and changes a person's shape by as much.
    The range is absolute: for crops of another shape multiply (3/4, 4/3) by their width / height. (3/4, 4/3) itself is
    what TransReID-SSL's pre-training uses; near-square pieces of a person are then stretched to twice their height.

    Args:
        global_size: (height, width) of the global crops in pixels.
        local_size: (height, width) of the local crops in pixels.
        num_local_crops: Number of local crops; may be 0.
        global_scale: Smallest and largest area of a global crop, as a fraction of the picture's.
        local_scale: The same for local crops.
        aspect_ratio: Smallest and largest width / height of a crop before it is resized.
        flip_probability: Probability of a horizontal flip.
        jitter_probability: Probability that the next four change a crop, in random order.
        brightness: Half width of the factor's interval around 1; so for contrast and saturation.
        contrast: See brightness.
        saturation: See brightness.
        hue: Largest turn of the hue, in full circles (at most 0.5).
        grayscale_probability: Probability of a grey crop.
        blur_probabilities: Probability of a Gaussian blur for the first global, second global and local crops.
        blur_sigma: Smallest and largest standard deviation of the blur in pixels.
        solarize_probability: Probability that the second global crop is solarized.

    Raises:
        ValueError: If a field lies outside its range.

    Source: `DataAugmentationDINO` of DINO (arXiv 2104.14294), iBOT and TransReID-SSL, `main_dino.py`.
    """

    global_size: tuple[int, int] = (256, 128)
    local_size: tuple[int, int] = (128, 64)
    num_local_crops: int = 8
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    aspect_ratio: tuple[float, float] = (3 / 8, 2 / 3)
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur_probabilities: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.2

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            _check_size(name, getattr(self, name))
        if self.num_local_crops < 0:
            raise ValueError(f"`num_local_crops` must be 0 or more; got {self.num_local_crops}.")
        if len(self.blur_probabilities) != 3:
            raise ValueError(
                "`blur_probabilities` must hold three values (first global, second global, local crops); got "
                f"{self.blur_probabilities}."
            )
        for name, limit in (
            ("global_scale", 1),
            ("local_scale", 1),
            ("aspect_ratio", math.inf),
            ("blur_sigma", math.inf),
        ):
            _check_range(name, getattr(self, name), limit)
        for name in ("flip", "jitter", "grayscale", "solarize"):
            _check_fraction(f"{name}_probability", getattr(self, f"{name}_probability"))
        for probability in self.blur_probabilities:
            _check_fraction("blur_probabilities", probability)
        for name, limit in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            _check_fraction(name, getattr(self, name), limit)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw the crops of one picture.

        Args:
            image: uint8 RGB (height, width, 3), any size.
            rng: Source of randomness.

        Returns:
            Global crops, uint8 (2, 3, height, width), and local crops, uint8 (num_local_crops, 3, height, width); not
            normalised (see `normalize`).

        Raises:
            ValueError: If the picture is not such an array.
        """
        _check_image(image)
        cv2.setNumThreads(0)
        global_crops = np.empty((2, 3, *self.global_size), np.uint8)
        local_crops = np.empty((self.num_local_crops, 3, *self.local_size), np.uint8)
        # all random numbers at once: some 150 calls of the generator take as long as three resizes
        draw = iter(rng.random((2 + self.num_local_crops) * DRAWS_PER_CROP).tolist()).__next__
        views = (image, cv2.flip(image, 1) if self.flip_probability > 0 else image)
        blur_first, blur_second, blur_local = self.blur_probabilities
        self._draw_crop(global_crops[0], views, self.global_scale, blur_first, 0.0, draw)
        self._draw_crop(global_crops[1], views, self.global_scale, blur_second, self.solarize_probability, draw)
        for crop in local_crops:
            self._draw_crop(crop, views, self.local_scale, blur_local, 0.0, draw)
        return global_crops, local_crops

    def _draw_crop(
        self,
        out: np.ndarray,
        views: tuple[np.ndarray, np.ndarray],
        scale: tuple[float, float],
        blur_probability: float,
        solarize_probability: float,
        draw: Callable[[], float],
    ) -> None:
        """Fill `out`, uint8 (3, height, width), with one crop of a picture or of its mirror image."""
        rows, columns, _ = views[0].shape
        top, left, height, width = draw_crop_box(rows, columns, scale, self.aspect_ratio, draw)
        flip = draw() < self.flip_probability
        if flip:
            left = columns - width - left
        crop = resize(views[flip][top : top + height, left : left + width], out.shape[1:])
        if draw() < self.jitter_probability:
            crop = self._jitter(crop, draw)
        if draw() < self.grayscale_probability:
            crop = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)  # one channel from here on
        if draw() < blur_probability:
            low, high = self.blur_sigma
            crop = gaussian_blur(crop, low + (high - low) * draw())
        if draw() < solarize_probability:
            crop = solarize(crop)
        if crop.ndim == 2:
            out[...] = crop
        else:
            cv2.split(crop, list(out))  # writes the three planes of `out`

    def _jitter(self, crop: np.ndarray, draw: Callable[[], float]) -> np.ndarray:
        steps = (
            (adjust_brightness, 1.0, self.brightness),
            (adjust_contrast, 1.0, self.contrast),
            (adjust_saturation, 1.0, self.saturation),
            (adjust_hue, 0.0, self.hue),
        )
        for step in _JITTER_ORDERS[int(len(_JITTER_ORDERS) * draw())]:
            adjust, neutral, spread = steps[step]
            if spread > 0:
                crop = adjust(crop, neutral + spread * (2 * draw() - 1))
        return crop


@dataclass(frozen=True)
class ReIDTransform:
    """Training transform of ReID fine-tuning: resize, flip, pad and crop, normalise, erase a rectangle.

    Args:
        size: (height, width) of the output in pixels.
        flip_probability: Probability of a horizontal flip.
        padding: Black pixels added on each side before a crop of `size` is taken at random.
        erasing_probability: Probability that a rectangle is replaced by normal noise (after normalisation).
        erasing_area: Smallest and largest area of that rectangle, as a fraction of the picture's.
        erasing_min_aspect: Its smallest height / width; the largest is the inverse.
        mean: Mean of each channel, for pixels scaled to [0, 1].
        std: Standard deviation of each channel, likewise.

    Raises:
        ValueError: If a field lies outside its range.

    Source: `train_transforms` of PersonViT's `transreid_pytorch/datasets/make_dataloader.py`; random erasing
    (arXiv 1708.04896) as timm's `RandomErasing` in mode "pixel".
    """

    size: tuple[int, int] = (256, 128)
    flip_probability: float = 0.5
    padding: int = 10
    erasing_probability: float = 0.5
    erasing_area: tuple[float, float] = (0.02, 1 / 3)
    erasing_min_aspect: float = 0.3
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        _check_size("size", self.size)
        if self.padding < 0:
            raise ValueError(f"`padding` must be 0 or more pixels; got {self.padding}.")
        _check_fraction("flip_probability", self.flip_probability)
        _check_fraction("erasing_probability", self.erasing_probability)
        _check_range("erasing_area", self.erasing_area, 1)
        _check_range("erasing_min_aspect", (self.erasing_min_aspect, 1.0), 1)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"`mean` and positive `std` need three channels each; got {self.mean} and {self.std}.")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Transform one picture.

        Args:
            image: uint8 RGB (height, width, 3), any size.
            rng: Source of randomness.

        Returns:
            Normalised pixels, float32 (3, height, width).

        Raises:
            ValueError: If the picture is not such an array.
        """
        _check_image(image)
        cv2.setNumThreads(0)
        height, width = self.size
        picture = resize(image, self.size)
        if rng.random() < self.flip_probability:
            picture = cv2.flip(picture, 1)
        if self.padding:
            pad = self.padding
            padded = cv2.copyMakeBorder(picture, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=(0, 0, 0))
            top, left = _draw_offset(2 * pad, rng.random), _draw_offset(2 * pad, rng.random)
            picture = padded[top : top + height, left : left + width]
        pixels = np.empty((3, height, width), np.float32)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            np.multiply(picture[..., channel], np.float32(1 / (255 * std)), out=pixels[channel])
            pixels[channel] -= np.float32(mean / std)
        if rng.random() < self.erasing_probability:
            self._erase(pixels, rng)
        return pixels

    def _erase(self, pixels: np.ndarray, rng: np.random.Generator) -> None:
        _, rows, columns = pixels.shape
        aspects = (self.erasing_min_aspect, 1 / self.erasing_min_aspect)
        for _ in range(ERASING_ATTEMPTS):
            width, height = _draw_rectangle(rows * columns, self.erasing_area, aspects, rng.random)
            # `aspects` is symmetric on a logarithmic scale, so it does not matter which side is divided by which.
            if 0 < height < rows and 0 < width < columns:
                top, left = _draw_offset(rows - height, rng.random), _draw_offset(columns - width, rng.random)
                noise = rng.standard_normal((3, height, width), dtype=np.float32)
                pixels[:, top : top + height, left : left + width] = noise
                return


def normalize(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Turn pictures of 0..255 into normalised float32 ones, on their own device.

    Args:
        pixels: uint8 (..., 3, height, width).
        mean: Mean of each channel, for pixels scaled to [0, 1].
        std: Standard deviation of each channel, likewise.

    Returns:
        float32 (..., 3, height, width): (pixels / 255 - mean) / std.

    Raises:
        ValueError: If `pixels` are not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise ValueError(f"`pixels` must be uint8, 0 to 255; got {pixels.dtype}.")
    mean_, std_ = (torch.tensor(list(x), device=pixels.device).view(-1, 1, 1) * 255 for x in (mean, std))
    return pixels.float().sub_(mean_).div_(std_)


def draw_crop_box(
    height: int, width: int, scale: tuple[float, float], aspect_ratio: tuple[float, float], draw: Callable[[], float]
) -> tuple[int, int, int, int]:
    """Rectangle within a picture: uniform in area, log-uniform in shape, anywhere.

    After ten rectangles that stick out of the picture, it is the largest centred one whose shape is in range.

    Args:
        height: Height of the picture in pixels.
        width: Width of the picture in pixels.
        scale: Smallest and largest area, as a fraction of the picture's.
        aspect_ratio: Smallest and largest width / height.
        draw: Gives a uniform random number in [0, 1), as a Generator's `random` does.

    Returns:
        (top, left, height, width) in pixels.

    Source: `RandomResizedCrop.get_params` of torchvision.
    """
    for _ in range(CROP_ATTEMPTS):
        w, h = _draw_rectangle(height * width, scale, aspect_ratio, draw)
        if 0 < w <= width and 0 < h <= height:
            return _draw_offset(height - h, draw), _draw_offset(width - w, draw), h, w
    w = min(width, max(round(height * aspect_ratio[1]), 1))
    h = min(height, max(round(width / aspect_ratio[0]), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a picture (height, width, 3) to `size` (height, width): bicubic, or area means where it shrinks a lot.

    OpenCV's bicubic takes four samples for each pixel at any scale; along an axis that shrinks by more than about 1.6
    it would alias. Where the other axis grows, area means shrink the one and bicubic stretches the other.
    """
    (rows, columns), (height, width) = image.shape[:2], size
    if max(rows / height, columns / width) <= MOST_BICUBIC_SHRINKAGE:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    # never to a larger size: INTER_AREA would be bilinear along both axes
    smaller = cv2.resize(image, (min(columns, width), min(rows, height)), interpolation=cv2.INTER_AREA)
    if rows >= height and columns >= width:
        return smaller
    return cv2.resize(smaller, (width, height), interpolation=cv2.INTER_CUBIC)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend a picture with black; a factor of 0 gives black, 1 the picture."""
    return cv2.convertScaleAbs(image, alpha=factor)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend a picture with its mean grey; a factor of 0 gives plain grey, 1 the picture."""
    red, green, blue, _ = cv2.sumElems(image)
    mean = (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue) / (image.shape[0] * image.shape[1])
    return cv2.addWeighted(image, factor, image, 0.0, (1.0 - factor) * mean)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend a picture with its grey version; a factor of 0 gives that version, 1 the picture."""
    return cv2.transform(image, _TO_GREY + factor * _FROM_GREY)


def adjust_hue(image: np.ndarray, factor: float) -> np.ndarray:
    """Turn the hue by `factor` full circles, in [-0.5, 0.5], to the nearest of `HUE_STEPS` steps."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    turns = _HUE_TURNS[round(factor * HUE_STEPS) % HUE_STEPS]
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, 0), turns), hsv, 0)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with a standard deviation of `sigma` pixels, to a hundredth, mirrored at the border."""
    kernel = _gaussian_kernel(max(round(100 * sigma), 1))
    return cv2.sepFilter2D(image, -1, kernel, kernel)  # as exact as GaussianBlur on uint8, and over twice as fast


@lru_cache(maxsize=512)
def _gaussian_kernel(hundredths: int) -> np.ndarray:
    sigma = hundredths / 100
    return cv2.getGaussianKernel(2 * math.ceil(3 * sigma) + 1, sigma, cv2.CV_32F)


def solarize(image: np.ndarray) -> np.ndarray:
    """Invert each value from 128 on."""
    return np.minimum(image, ~image)


def _draw_rectangle(
    area: int, scale: tuple[float, float], aspect_ratio: tuple[float, float], draw: Callable[[], float]
) -> tuple[int, int]:
    """(width, height) of a rectangle, uniform in area and log-uniform in width / height."""
    target = area * (scale[0] + (scale[1] - scale[0]) * draw())
    low, high = math.log(aspect_ratio[0]), math.log(aspect_ratio[1])
    aspect = math.exp(low + (high - low) * draw())
    return round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))


def _draw_offset(largest: int, draw: Callable[[], float]) -> int:
    return int((largest + 1) * draw())


def _check_image(image: np.ndarray) -> None:
    found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"`image` must be a uint8 RGB array (height, width, 3); got {found}.")
    if 0 in image.shape:
        raise ValueError(f"`image` has no pixels: {found}.")


def _check_size(name: str, size: tuple[int, int]) -> None:
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"`{name}` must be (height, width) in whole pixels; got {size}.")


def _check_range(name: str, values: tuple[float, float], limit: float) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= limit:
        raise ValueError(
            f"`{name}` must be (smallest, largest) with 0 < smallest <= largest <= {limit}; got {values}."
        )


def _check_fraction(name: str, value: float, limit: float = 1.0) -> None:
    if not 0 <= value <= limit:
        raise ValueError(f"`{name}` must lie in [0, {limit}]; got {value}.")
