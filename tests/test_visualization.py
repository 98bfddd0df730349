import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from personvit_hf.patches import PatchMatches, PatchTokens
from personvit_hf.visualization import (
    IGNORED,
    QUERY,
    RIGHT,
    UNKNOWN,
    WRONG,
    draw_attention,
    draw_correspondences,
    draw_embedding_map,
    draw_occlusion,
    draw_parts,
    draw_rankings,
    save_figure,
)

QUERIES = [np.full((20, 10, 3), value, np.uint8) for value in (10, 20)]
GALLERY = [np.full((7 + i, 30, 3), 100 + i, np.uint8) for i in range(3)]  # of any size
RANKINGS = np.array([[2, 0, 1], [1, 2, 0]])
OUTCOMES = np.array([[1, 0, -1], [0, -1, 1]])


def patches(num_images=2, rows=4, columns=2, heads=3, stride=16) -> PatchTokens:
    rng = np.random.default_rng(0)
    height, width = (rows - 1) * stride + 16, (columns - 1) * stride + 16
    tokens = rng.normal(size=(num_images, rows, columns, 8)).astype(np.float32)
    attention = rng.random((num_images, heads, rows, columns)).astype(np.float32)
    embeddings = np.eye(num_images, 8, dtype=np.float32)
    embeddings[:, 0] += 1
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    images = rng.integers(0, 256, (num_images, height, width, 3), np.uint8)
    return PatchTokens(images, tokens, attention, embeddings, 16, stride)


def picture_of(axis) -> np.ndarray:
    """The image at the bottom of a panel."""
    return np.asarray(axis.images[0].get_array())


def map_of(axis) -> np.ndarray:
    """The map over it."""
    return np.asarray(axis.images[1].get_array())


def test_every_tile_of_a_sheet_shows_its_image_its_border_and_its_sign():
    axes = draw_rankings(QUERIES, GALLERY, RANKINGS, OUTCOMES, np.array([[0.9, 0.8, 0.1], [0.7, 0.6, 0.5]])).axes
    assert len(axes) == 2 * 4
    signs = {1: (RIGHT, "✓ {}"), 0: (WRONG, "✗ {}"), -1: (IGNORED, "({})")}
    likeness = [["0.90", "0.80", "0.10"], ["0.70", "0.60", "0.50"]]
    for row in range(2):
        shown = [(QUERIES[row], QUERY, "query")]
        for column, index in enumerate(RANKINGS[row]):
            color, sign = signs[OUTCOMES[row, column]]
            shown.append((GALLERY[index], color, sign.format(likeness[row][column])))
        for axis, (image, color, text) in zip(axes[row * 4 : row * 4 + 4], shown, strict=True):
            assert (picture_of(axis) == image).all()
            assert {to_rgb(spine.get_edgecolor()) for spine in axis.spines.values()} == {to_rgb(color)}
            assert axis.get_xlabel() == text
            # of the same camera: the image itself is pale, too
            assert (axis.images[0].get_alpha() < 0.5) == (color == IGNORED)


def test_likeness_is_written_so_that_it_differs():
    similarities = np.array([[0.99985, 0.99983, 0.99979]])
    axes = draw_rankings(QUERIES[:1], GALLERY, RANKINGS[:1], None, similarities).axes
    assert [axis.get_xlabel() for axis in axes[1:]] == ["0.99985", "0.99983", "0.99979"]


def test_a_sheet_of_which_nothing_is_known_is_neutral_and_not_faded():
    axes = draw_rankings(QUERIES, GALLERY, RANKINGS).axes
    for axis in axes[1:4]:
        assert to_rgb(axis.spines["left"].get_edgecolor()) == to_rgb(UNKNOWN)
        assert axis.images[0].get_alpha() == 1 and axis.get_xlabel() == ""


@pytest.mark.parametrize(
    "rankings, outcomes",
    [(RANKINGS, OUTCOMES[:, :2]), (RANKINGS[:1], OUTCOMES[:1]), (RANKINGS[:, 0], OUTCOMES[:, 0])],
)
def test_sheets_whose_shapes_do_not_belong_together(rankings, outcomes):
    with pytest.raises(ValueError, match="2 queries") as caught:
        draw_rankings(QUERIES, GALLERY, rankings, outcomes)
    assert str(rankings.shape) in str(caught.value)


def test_unknown_outcome():
    with pytest.raises(ValueError, match=r"`outcomes` must be 1, 0 or -1, got \[-1, 0, 1, 2\]"):
        draw_rankings(QUERIES, GALLERY, RANKINGS, np.array([[1, 0, -1], [0, -1, 2]]))


@pytest.mark.parametrize("stride", [16, 12])
def test_parts_lie_over_their_patches_in_one_colour_each(stride):
    shown = patches(stride=stride)
    parts = np.arange(16).reshape(2, 4, 2) % 5
    figure = draw_parts(shown, parts)
    above, below = figure.axes[:2], figure.axes[2:]
    for index in range(2):
        assert (picture_of(above[index]) == shown.images[index]).all()
        assert (map_of(below[index]) == parts[index]).all()
        assert tuple(below[index].images[1].get_extent()) == shown.extent
        height, width = shown.images.shape[1:3]
        assert below[index].get_xlim() == (0, width) and below[index].get_ylim() == (height, 0)
    colors = [[axis.images[1].to_rgba(part)[:3] for part in range(5)] for axis in below]
    assert colors[0] == colors[1] and len(set(colors[0])) == 5
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["1", "2", "3", "4", "5"]
    handles = [to_rgb(handle.get_facecolor()) for handle in legend.get_patches()]
    np.testing.assert_allclose(handles, colors[0], atol=1e-6)


def test_parts_of_other_patches_or_too_many():
    with pytest.raises(ValueError, match=r"\(2, 4, 2\), got \(2, 2, 4\)"):
        draw_parts(patches(), np.zeros((2, 2, 4), int))
    with pytest.raises(ValueError, match="at most 16 groups.*got 17"):
        draw_parts(patches(), np.full((2, 4, 2), 16))


def test_images_may_be_named():
    shown = patches()
    assert [axis.get_ylabel() for axis in draw_attention(shown, False, ["one", "two"]).axes[::2]] == ["one", "two"]
    figure = draw_parts(shown, np.zeros((2, 4, 2), int), ["one", "two"])
    assert [axis.get_title() for axis in figure.axes[:2]] == ["one", "two"]
    for draw in (lambda: draw_attention(shown, names=["one"]), lambda: draw_parts(shown, np.zeros((2, 4, 2)), ["a"])):
        with pytest.raises(ValueError, match="1 for 2 images"):
            draw()


def test_attention_has_a_panel_for_the_mean_and_each_head():
    shown = patches()
    axes = draw_attention(shown).axes
    assert len(axes) == 2 * (2 + 3)
    for row in range(2):
        picture, mean, *heads = axes[row * 5 : row * 5 + 5]
        assert (picture_of(picture) == shown.images[row]).all()
        np.testing.assert_allclose(map_of(mean), shown.attention[row].mean(axis=0))
        for head, axis in enumerate(heads):
            np.testing.assert_array_equal(map_of(axis), shown.attention[row, head])
            peak = shown.attention[row, head].max() * 8  # as a multiple of an eighth
            assert axis.get_title().splitlines()[-1] == f"{peak:.1f}×"
            assert axis.images[1].get_clim() == (0, pytest.approx(shown.attention[row, head].max()))
    assert [axis.get_title().splitlines()[0] for axis in axes[1:5]] == ["mean", "head 1", "head 2", "head 3"]
    assert len(draw_attention(shown, heads=False).axes) == 2 * 2


def test_lines_join_the_patches_that_match():
    first, second = patches(1), patches(1, rows=3, columns=3)
    matches = PatchMatches(
        np.array([[0, 1], [3, 0], [1, 1]]), np.array([[2, 2], [0, 1], [1, 1]]), np.array([0.9, 0.8, 0.1], np.float32)
    )
    figure = draw_correspondences(first, second, matches, num_shown=2)
    assert [(line.xy1, line.xy2) for line in figure.artists] == [((24, 8), (40, 40)), ((8, 56), (24, 8))]
    for axis, points in zip(figure.axes, ([(24, 8), (8, 56)], [(40, 40), (24, 8)]), strict=True):
        assert [tuple(np.ravel(dot.get_data())) for dot in axis.lines] == points
    assert "2 of 3 mutual matches" in figure.get_suptitle() and "1.00000" in figure.get_suptitle()
    with pytest.raises(ValueError, match="`second` must hold one image, got 2"):
        draw_correspondences(first, patches(2), matches)


def test_occlusion_tells_what_is_hidden_and_what_is_left():
    shown = patches(3)
    axes = draw_occlusion(shown, [0, 0.25, 0.5]).axes
    assert [axis.get_title() for axis in axes[:3]] == ["0% hidden", "25% hidden", "50% hidden"]
    # rows (2, 0, 0), (1, 1, 0), (1, 0, 1) of length 1
    assert [axis.get_title() for axis in axes[3:]] == ["cosine\n1.00", "cosine\n0.71", "cosine\n0.71"]
    for index in range(3):
        np.testing.assert_allclose(map_of(axes[3 + index]), shown.attention[index].mean(axis=0))
    with pytest.raises(ValueError, match="2 for 3 images"):
        draw_occlusion(shown, [0, 0.5])


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_map_shows_every_image_of_the_people_it_shows(method):
    rng = np.random.default_rng(0)
    people = np.repeat([1, 2, 3, 0], [10, 8, 3, 4])
    centres = 10 * rng.normal(size=(4, 6))
    embeddings = centres[people] + rng.normal(size=(len(people), 6))
    axis = draw_embedding_map(embeddings, people, np.arange(len(people)) % 2, method, num_people=2).axes[0]
    clouds = [np.stack(line.get_data(), axis=1) for line in axis.lines]
    assert sum(map(len, clouds)) == 10 + 8 + 4  # person 3 has fewest
    names = [line.get_label() for line in axis.lines if not line.get_label().startswith("_")]
    assert names == ["nobody", "person 1", "person 2", "camera 0", "camera 1"]
    of_one, of_two = np.concatenate(clouds[1:3]), np.concatenate(clouds[4:6])
    gap = np.linalg.norm(of_one.mean(axis=0) - of_two.mean(axis=0))
    assert gap > np.linalg.norm(of_one - of_one.mean(axis=0), axis=1).mean()


def test_maps_of_nobody_or_by_no_method():
    with pytest.raises(ValueError, match="pca, tsne, got 'umap'"):
        draw_embedding_map(np.zeros((5, 3)), np.ones(5, int), method="umap")
    with pytest.raises(ValueError, match="of 0"):
        draw_embedding_map(np.zeros((5, 3)), np.zeros(5, int))
    with pytest.raises(ValueError, match="at least 3 images.*got 1 "):  # of the one person that is to be shown
        draw_embedding_map(np.eye(5), np.arange(1, 6), num_people=1)
    with pytest.raises(ValueError, match="each of the 5"):
        draw_embedding_map(np.zeros((5, 3)), np.ones(4, int))


def test_files_are_whole_and_the_same_each_time(tmp_path):
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        files = [tmp_path / f"{i}{suffix}" for i in range(2)]
        for file in files:
            save_figure(draw_attention(patches(1), heads=False), file)
        contents = [file.read_bytes() for file in files]
        assert contents[0] == contents[1] and contents[0].startswith(start)
    with Image.open(tmp_path / "0.png") as picture:
        assert round(picture.info["dpi"][0]) == 300
    with pytest.raises(ValueError, match=r"end in \.png, \.svg, \.pdf"):
        save_figure(draw_attention(patches()), tmp_path / "picture.gif")
    with pytest.raises(FileExistsError):
        save_figure(draw_attention(patches()), tmp_path / "0.png", overwrite=False)
    assert len(list(tmp_path.iterdir())) == 6


def test_nobody_elses_figures_change():
    import matplotlib

    def settings() -> dict:
        return {name: value for name, value in matplotlib.rcParams.items() if "size" in name or "figure" in name}

    before = settings()
    draw_attention(patches())
    assert settings() == before
