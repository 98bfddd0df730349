"""Pictures that show what a model finds, as matplotlib figures; `personvit show` writes them.

Figures are made for a printed column: text of 7 points or more, and colours are never the only sign.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .extras import require
from .files import written_aside
from .patches import PatchMatches, PatchTokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, IGNORED, QUERY, UNKNOWN = "#1b9e4b", "#cc3311", "#8c8c8c", "#1f5fbf", "#333333"
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
MAP_METHODS = ("pca", "tsne")

_STYLE = {name: 7 for name in ("font.size", "axes.titlesize", "axes.labelsize", "figure.titlesize", "legend.fontsize")}
_OUTCOMES = {1: (RIGHT, "✓ {}"), 0: (WRONG, "✗ {}"), -1: (IGNORED, "({})")}
# Okabe and Ito's colours, which colour-blind people tell apart, then Tol's muted ones.
_COLORS = [
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000"),
    *("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255"),
]
_MARKERS = "os^DvPX*<>"


def _small_print(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the style of this module, which nobody else's figures get."""

    @functools.wraps(draw)
    def styled(*args, **kwargs):
        require("matplotlib", "show")
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


@_small_print
def draw_rankings(
    query_images: Sequence[np.ndarray],
    gallery_images: Sequence[np.ndarray],
    rankings: np.ndarray,
    outcomes: np.ndarray | None = None,
    similarities: np.ndarray | None = None,
) -> Figure:
    """A row for each query: the query in blue, then the gallery images ranked for it.

    Args:
        query_images: uint8 (height, width, 3) RGB, one a row.
        gallery_images: uint8 (height, width, 3) RGB.
        rankings: int (rows, columns), which gallery images to show, nearest first.
        outcomes: int (rows, columns): 1 for the same person (green, ✓), 0 for another (red, ✗), -1 for an image that
            the protocol ignores, of the same person in the same camera (grey and faded). None where it isn't known.
        similarities: float (rows, columns), written under the images.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The shapes don't belong together, or an outcome is none of the three.
    """
    arrays = {"outcomes": outcomes, "similarities": similarities}
    wrong = [name for name, array in arrays.items() if array is not None and array.shape != rankings.shape]
    if rankings.ndim != 2 or not rankings.size or len(query_images) != len(rankings) or wrong:
        shapes = [f"`{name}` {array.shape}" for name, array in arrays.items() if array is not None]
        raise ValueError(
            f"{' and '.join([f'`rankings` {rankings.shape}', *shapes])} must be (rows, columns), with a row for each "
            f"of the {len(query_images)} queries."
        )
    if outcomes is not None and not np.isin(outcomes, list(_OUTCOMES)).all():
        raise ValueError(f"`outcomes` must be 1, 0 or -1, got {np.unique(outcomes).tolist()}.")
    rows, columns = rankings.shape
    figure = _figure((columns + 1.2) * 0.6, rows * 1.35)
    decimals = 2 if similarities is None else _decimals(similarities)
    ratios = [1.0, 0.2] + [1.0] * columns  # a gap after the query
    grid = figure.add_gridspec(rows, columns + 2, width_ratios=ratios)
    for row, query in enumerate(query_images):
        _tile(figure.add_subplot(grid[row, 0]), query, QUERY, "query")
        for column, index in enumerate(rankings[row]):
            color, sign = (UNKNOWN, "{}") if outcomes is None else _OUTCOMES[int(outcomes[row, column])]
            text = sign.format("" if similarities is None else f"{similarities[row, column]:.{decimals}f}")
            axis = figure.add_subplot(grid[row, column + 2])
            _tile(axis, gallery_images[index], color, text.strip(), faded=color == IGNORED)
    return figure


@_small_print
def draw_parts(patches: PatchTokens, parts: np.ndarray, names: Sequence[str] | None = None) -> Figure:
    """Under each image the groups that its patches belong to (PersonViT, fig. 4): one colour means one group in all.

    Args:
        patches: The images.
        parts: int (images, rows, columns), groups from 0, as `cluster_parts` finds them.
        names: What to write above each image, if anything.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Shapes or names don't belong together, or there are more groups than colours (16).
    """
    if parts.shape != patches.tokens.shape[:3]:
        raise ValueError(f"`parts` must be (images, rows, columns) {patches.tokens.shape[:3]}, got {parts.shape}.")
    num_parts = int(parts.max()) + 1
    if num_parts > len(_COLORS):
        raise ValueError(f"`parts` must have at most {len(_COLORS)} groups to be told apart, got {num_parts}.")
    names = _names(names, len(parts))
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure = _figure(max(2.2, 0.6 * len(parts) + 0.5), 2.4)
    axes = figure.subplots(2, len(parts), squeeze=False)
    for column, (image, groups) in enumerate(zip(patches.images, parts, strict=True)):
        _picture(axes[0, column], image)
        axes[0, column].set_title(names[column])
        _picture(axes[1, column], image, gray=True)
        colors = ListedColormap(_COLORS[:num_parts])
        limits = {"vmin": -0.5, "vmax": num_parts - 0.5}
        _overlay(axes[1, column], patches, groups, cmap=colors, **limits, alpha=0.65, interpolation="nearest")
    handles = [Patch(color=_COLORS[part], label=str(part + 1)) for part in range(num_parts)]
    figure.legend(handles=handles, title="group", loc="outside right center", frameon=False)
    return figure


@_small_print
def draw_attention(patches: PatchTokens, heads: bool = True, names: Sequence[str] | None = None) -> Figure:
    """What [CLS] looks at (PersonViT, fig. 5): a row for each image, a column for the mean and for each head.

    Each map has its own scale, from nothing to its largest value, which stands above it as a multiple of what every
    patch would get if all got the same.

    Args:
        patches: Images and attention.
        heads: Whether to draw the heads, too.
        names: What to write beside each image, if anything.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is not one name an image.
    """
    labels = _names(names, len(patches.images))
    num_heads = patches.attention.shape[1] if heads else 0
    figure = _figure(max(2.0, 0.75 * (2 + num_heads)), 1.5 * len(patches.images) + 0.2)
    axes = figure.subplots(len(patches.images), 2 + num_heads, squeeze=False)
    for row, (image, attention) in enumerate(zip(patches.images, patches.attention, strict=True)):
        _picture(axes[row, 0], image)
        axes[row, 0].set_ylabel(labels[row])
        maps = ["mean", *(f"head {head + 1}" for head in range(num_heads))]
        for axis, name, values in zip(axes[row, 1:], maps, [attention.mean(axis=0), *attention], strict=False):
            _heat(axis, patches, image, values)
            peak = values.max() * values.size
            axis.set_title(f"{name}\n{peak:.1f}×" if row == 0 else f"{peak:.1f}×")
    return figure


@_small_print
def draw_correspondences(
    first: PatchTokens, second: PatchTokens, matches: PatchMatches, num_shown: int = 12
) -> Figure:
    """Lines between the patches of two images that are each other's most similar (PersonViT, fig. 6).

    Args:
        first: One image.
        second: One other image.
        matches: As `match_patches` finds them for the two.
        num_shown: The most similar ones that are drawn.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `first` or `second` don't hold one image, or `num_shown` is below 1.
    """
    if num_shown < 1:
        raise ValueError(f"The number of matches to draw must be at least 1, got {num_shown}.")
    for name, patches in (("first", first), ("second", second)):
        if len(patches.images) != 1:
            raise ValueError(f"`{name}` must hold one image, got {len(patches.images)}.")
    from matplotlib.patches import ConnectionPatch

    figure = _figure(3.3, 2.9)
    axes = figure.subplots(1, 2, gridspec_kw={"wspace": 0.4})
    for axis, patches in zip(axes, (first, second), strict=True):
        _picture(axis, patches.images[0])
    shown = slice(num_shown)
    for number, (here, there) in enumerate(zip(matches.first[shown], matches.second[shown], strict=True)):
        color = _COLORS[number % len(_COLORS)]
        line = ConnectionPatch(
            first.centre(*here), second.centre(*there), "data", "data", axesA=axes[0], axesB=axes[1], color=color, lw=1
        )
        line.set_in_layout(False)
        figure.add_artist(line)
        for axis, point in zip(axes, (first.centre(*here), second.centre(*there)), strict=True):
            axis.plot(*point, "o", color=color, ms=4, mec="white", mew=0.6)
    figure.suptitle(
        f"cosine of the pictures {float(first.embeddings[0] @ second.embeddings[0]):.5f}\n"
        f"{min(num_shown, len(matches.first))} of {len(matches.first)} mutual matches"
    )
    return figure


@_small_print
def draw_occlusion(patches: PatchTokens, shares: Sequence[float]) -> Figure:
    """Attention to one person who is hidden more and more, and what becomes of the feature.

    Args:
        patches: The same image as `occlude` hides it, in the order of `shares`; the first is what the others' cosine
            similarity refers to.
        shares: Hidden share of each, a fraction.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is not one share an image.
    """
    if len(shares) != len(patches.images):
        raise ValueError(f"`shares` must have one entry an image: {len(shares)} for {len(patches.images)} images.")
    figure = _figure(max(2.0, 0.7 * len(shares)), 2.9)
    axes = figure.subplots(2, len(shares), squeeze=False)
    similarity = patches.embeddings @ patches.embeddings[0]
    decimals = _decimals(similarity)
    for column, (image, share) in enumerate(zip(patches.images, shares, strict=True)):
        _picture(axes[0, column], image)
        axes[0, column].set_title(f"{100 * share:.0f}% hidden")
        _heat(axes[1, column], patches, image, patches.attention[column].mean(axis=0))
        axes[1, column].set_title(f"cosine\n{similarity[column]:.{decimals}f}")
    return figure


@_small_print
def draw_embedding_map(
    embeddings: np.ndarray,
    person_ids: np.ndarray,
    camera_ids: np.ndarray | None = None,
    method: str = "pca",
    num_people: int = 12,
) -> Figure:
    """Features in two dimensions: a colour for each person, a shape for each camera.

    Args:
        embeddings: float (images, dim).
        person_ids: int (images,). Junk (-1) and distractors (0) are small grey dots.
        camera_ids: int (images,), if known.
        method: "pca", the two directions of largest variance, or "tsne", which keeps neighbours together and tells
            nothing by distances or sizes.
        num_people: People to show, those with most images.

    Raises:
        ImportError: matplotlib or scikit-learn is not installed.
        ValueError: Lengths differ, there is no person, too few images, or no such method.
    """
    if method not in MAP_METHODS:
        raise ValueError(f"`method` must be one of {', '.join(MAP_METHODS)}, got {method!r}.")
    if len(person_ids) != len(embeddings) or (camera_ids is not None and len(camera_ids) != len(embeddings)):
        raise ValueError(f"There must be an id for each of the {len(embeddings)} embeddings.")
    if num_people < 1:
        raise ValueError(f"The number of people to show must be at least 1, got {num_people}.")
    people, counts = np.unique(person_ids[person_ids > 0], return_counts=True)
    people = people[np.argsort(-counts, kind="stable")[:num_people]]
    cameras = np.zeros(len(embeddings), int) if camera_ids is None else np.asarray(camera_ids)
    shown = np.isin(person_ids, people) | (person_ids < 1)
    if not len(people) or shown.sum() < 3:
        raise ValueError(
            f"A map needs at least 3 images and a person (id above 0), got {shown.sum()} images of {len(people)}."
        )
    points = _two_dimensions(embeddings[shown], method)
    person_ids, cameras = person_ids[shown], cameras[shown]
    figure = _figure(4.6, 3.6)
    axis = figure.subplots()
    axis.set_xticks([])
    axis.set_yticks([])
    axis.plot(
        *points[person_ids < 1].T, ".", color="#bbbbbb", ms=3, label="nobody" if (person_ids < 1).any() else None
    )
    names = np.unique(cameras)
    for number, person in enumerate(people):
        for place, camera in enumerate(names):
            chosen = points[(person_ids == person) & (cameras == camera)]
            marker, color = _MARKERS[place % len(_MARKERS)], _COLORS[number % len(_COLORS)]
            axis.plot(*chosen.T, marker, color=color, ms=4.5, mec="white", mew=0.4)
        axis.plot([], [], "o", color=_COLORS[number % len(_COLORS)], ms=4.5, label=f"person {person}")
    if camera_ids is not None:
        for place, camera in enumerate(names):
            axis.plot([], [], _MARKERS[place % len(_MARKERS)], color="black", ms=4, label=f"camera {camera}")
    axis.set_xlabel({"pca": "first principal component", "tsne": "t-SNE"}[method])
    axis.set_ylabel({"pca": "second principal component", "tsne": ""}[method])
    figure.legend(loc="outside right center", frameon=False)
    return figure


def save_figure(figure: Figure, file: str | Path, overwrite: bool = True, dpi: int = 300) -> None:
    """Writes a figure whole or not at all; the same figure gives the same bytes.

    Args:
        figure: What to write.
        file: Where, ending in .png, .svg or .pdf.
        overwrite: Whether to replace an earlier one.
        dpi: Dots an inch of a .png.

    Raises:
        FileExistsError: The file exists and may not be replaced.
        ValueError: The name has another ending.
    """
    import matplotlib

    check_figure_name(file)
    file = Path(file)
    undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[file.suffix.lower()]
    with written_aside(file, overwrite) as aside, matplotlib.rc_context({"svg.hashsalt": "personvit"}):
        figure.savefig(aside, dpi=dpi, metadata=undated)


def check_figure_name(file: str | Path) -> None:
    """Raises ValueError if a figure can't be written under this name."""
    if Path(file).suffix.lower() not in FIGURE_SUFFIXES:
        raise ValueError(f"{file}: a picture's name must end in {', '.join(FIGURE_SUFFIXES)}.")


def _two_dimensions(embeddings: np.ndarray, method: str) -> np.ndarray:
    require("sklearn", "show")
    if method == "pca":
        from sklearn.decomposition import PCA

        return PCA(2, random_state=0).fit_transform(embeddings)
    from sklearn.manifold import TSNE

    perplexity = min(20.0, (len(embeddings) - 1) / 3)
    return TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0).fit_transform(embeddings)


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches; not pyplot's, which would keep it."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    return figure


def _names(names: Sequence[str] | None, number: int) -> Sequence[str]:
    if names is not None and len(names) != number:
        raise ValueError(f"`names` must have one entry an image: {len(names)} for {number} images.")
    return [""] * number if names is None else names


def _decimals(similarities: np.ndarray) -> int:
    """Digits after the point that tell similarities apart: fine-tuned features can all lie close to 1."""
    spread = float(np.ptp(similarities))
    return int(np.clip(np.ceil(-np.log10(spread)) + 1, 2, 5)) if spread > 0 else 2


def _picture(axis: Axes, image: np.ndarray, gray: bool = False, **options: Any) -> None:
    """An image without axes, whose coordinates are its pixels' edges, from 0."""
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    height, width = image.shape[:2]
    if gray:
        image, options = image.mean(axis=2), {"cmap": "gray", "vmin": 0, "vmax": 255, **options}
    axis.imshow(image, extent=(0, width, height, 0), **options)


def _overlay(axis: Axes, patches: PatchTokens, values: np.ndarray, **options: Any) -> None:
    """A map of an image's patches over it; patches that overlap or leave an edge cover less than the image."""
    limits = axis.get_xlim(), axis.get_ylim()
    axis.imshow(values, extent=patches.extent, **options)
    axis.set(xlim=limits[0], ylim=limits[1])


def _heat(axis: Axes, patches: PatchTokens, image: np.ndarray, values: np.ndarray) -> None:
    _picture(axis, image, gray=True)
    _overlay(axis, patches, values, cmap="inferno", vmin=0, alpha=0.6, interpolation="hanning")


def _tile(axis: Axes, image: np.ndarray, color: str, text: str, faded: bool = False) -> None:
    _picture(axis, image, alpha=0.35 if faded else 1.0, aspect="auto")
    axis.set_box_aspect(2)
    axis.set_xlabel(text, color=color, labelpad=1.5)
    for spine in axis.spines.values():
        spine.set(visible=True, color=color, linewidth=2.2, linestyle=(0, (1, 1)) if faded else "-")
