import numpy as np
import pytest

from personvit_hf.visualization import IGNORED, QUERY, RIGHT, WRONG, draw_rankings

HEIGHT, WIDTH, BORDER, GAP = 20, 10, 4, 6
QUERY_COLORS = [(10, 20, 30), (40, 50, 60)]
GALLERY_COLORS = [(100, 0, 0), (0, 100, 0), (0, 0, 100)]
RANKINGS = np.array([[2, 0, 1], [1, 2, 0]])
OUTCOMES = np.array([[1, 0, -1], [0, -1, 1]])


def plain(color: tuple[int, int, int], shape: tuple[int, int] = (50, 30)) -> np.ndarray:
    return np.full((*shape, 3), color, np.uint8)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    queries = [plain(color) for color in QUERY_COLORS]
    gallery = [plain(color, (7 + i, 90)) for i, color in enumerate(GALLERY_COLORS)]  # of any size
    return np.asarray(draw_rankings(queries, gallery, RANKINGS, OUTCOMES, tile_size=(HEIGHT, WIDTH)))


def tile(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """The tile of a row; column 0 is the query, ranked images begin at 1 after another gap."""
    top = GAP + row * (HEIGHT + 2 * BORDER + GAP)
    left = GAP * (2 if column else 1) + column * (WIDTH + 2 * BORDER + GAP)
    return picture[top : top + HEIGHT + 2 * BORDER, left : left + WIDTH + 2 * BORDER]


def test_every_tile_shows_its_image_within_its_color(picture):
    frames = {1: RIGHT, 0: WRONG, -1: IGNORED}
    for row in range(2):
        shown = [(QUERY_COLORS[row], QUERY)]
        shown += [(GALLERY_COLORS[i], frames[k]) for i, k in zip(RANKINGS[row], OUTCOMES[row], strict=True)]
        for column, (color, frame) in enumerate(shown):
            found = tile(picture, row, column)
            inner = found[BORDER:-BORDER, BORDER:-BORDER]
            assert inner.shape == (HEIGHT, WIDTH, 3)
            assert (inner == color).all()
            border = np.ones(found.shape[:2], bool)
            border[BORDER:-BORDER, BORDER:-BORDER] = False
            assert (found[border] == frame).all()


def test_tiles_stand_apart_on_white(picture):
    outside = np.ones(picture.shape[:2], bool)
    for row in range(2):
        for column in range(4):
            top = GAP + row * (HEIGHT + 2 * BORDER + GAP)
            left = GAP * (2 if column else 1) + column * (WIDTH + 2 * BORDER + GAP)
            outside[top : top + HEIGHT + 2 * BORDER, left : left + WIDTH + 2 * BORDER] = False
    colors = {tuple(color) for color in np.unique(picture[outside], axis=0).tolist()}
    assert colors == {(255, 255, 255), IGNORED}  # and the line between queries and the rest
    assert (picture[0] == 255).all() and (picture[-1] == 255).all()
    assert (picture[:, 0] == 255).all() and (picture[:, -1] == 255).all()


@pytest.mark.parametrize(
    "rankings, outcomes",
    [
        (RANKINGS, OUTCOMES[:, :2]),
        (RANKINGS[:1], OUTCOMES[:1]),
        (RANKINGS[:, 0], OUTCOMES[:, 0]),
    ],
)
def test_shapes_that_do_not_belong_together(rankings, outcomes):
    queries, gallery = [plain(c) for c in QUERY_COLORS], [plain(c) for c in GALLERY_COLORS]
    with pytest.raises(ValueError, match="2 queries") as caught:
        draw_rankings(queries, gallery, rankings, outcomes)
    assert str(rankings.shape) in str(caught.value)


def test_unknown_outcome():
    queries, gallery = [plain(c) for c in QUERY_COLORS], [plain(c) for c in GALLERY_COLORS]
    with pytest.raises(ValueError, match=r"`outcomes` must be 1, 0 or -1, got \[-1, 0, 1, 2\]"):
        draw_rankings(queries, gallery, RANKINGS, np.array([[1, 0, -1], [0, -1, 2]]))
