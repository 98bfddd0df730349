"""Pictures that show what a model finds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps

RIGHT, WRONG, IGNORED, QUERY = (40, 160, 60), (205, 50, 45), (150, 150, 150), (40, 90, 200)


def draw_rankings(
    query_images: Sequence[np.ndarray],
    gallery_images: Sequence[np.ndarray],
    rankings: np.ndarray,
    outcomes: np.ndarray,
    tile_size: tuple[int, int] = (128, 64),
) -> Image.Image:
    """A row for each query: the query in blue, then the gallery images ranked for it.

    Args:
        query_images: uint8 (height, width, 3) RGB, one a row.
        gallery_images: uint8 (height, width, 3) RGB.
        rankings: int (rows, columns), which gallery images to show, nearest first.
        outcomes: int (rows, columns): 1 for the same person (green), 0 for another (red), -1 for an image that the
            protocol ignores, of the same person in the same camera (grey).
        tile_size: (height, width) of an image in pixels.

    Returns:
        An RGB picture.

    Raises:
        ValueError: if the shapes don't belong together, or an outcome is none of the three.
    """
    if rankings.ndim != 2 or rankings.shape != outcomes.shape or len(query_images) != len(rankings):
        raise ValueError(
            f"`rankings` {rankings.shape} and `outcomes` {outcomes.shape} must both be (rows, columns), with a row "
            f"for each of the {len(query_images)} queries."
        )
    if not np.isin(outcomes, (1, 0, -1)).all():
        raise ValueError(f"`outcomes` must be 1, 0 or -1, got {np.unique(outcomes).tolist()}.")
    height, width = tile_size
    border, gap = 4, 6
    column_width, row_height = width + 2 * border + gap, height + 2 * border + gap
    rows, columns = rankings.shape
    canvas = Image.new("RGB", (gap + (columns + 1) * column_width + gap, gap + rows * row_height), "white")
    colors = {1: RIGHT, 0: WRONG, -1: IGNORED}

    def paste(image: np.ndarray, row: int, left: int, color: tuple[int, int, int]) -> None:
        tile = ImageOps.expand(Image.fromarray(image).resize((width, height)), border, color)
        canvas.paste(tile, (left, gap + row * row_height))

    for row, query in enumerate(query_images):
        paste(query, row, gap, QUERY)
        for column in range(columns):
            left = 2 * gap + (column + 1) * column_width
            paste(gallery_images[rankings[row, column]], row, left, colors[int(outcomes[row, column])])
    line = gap + column_width
    ImageDraw.Draw(canvas).line([(line, gap), (line, canvas.height - gap)], fill=IGNORED, width=2)
    return canvas
