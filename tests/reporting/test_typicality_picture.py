"""What can be read on the picture of a map: colours of cells, tiles in their places, and text that meets nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsi_anomaly.reporting.page import ORANGE, Page
from wsi_anomaly.reporting.typicality_picture import (
    PrototypeTile,
    _page,
    _panels,
    choose_cells,
    write_typicality_page,
)

BLUE_TILE = np.full((64, 64, 3), (10, 20, 200), np.uint8)


def hits_of(shape: tuple[int, int], seed: int = 0) -> Any:
    """How many tiles each cell has; many have none."""
    return np.random.default_rng(seed).poisson(1.0, shape)


def tiles_of(hits: Any, z: float = 1.5) -> list[PrototypeTile]:
    """All of one colour."""
    return [
        PrototypeTile(block, row, column, BLUE_TILE, int(hits[row, column]), z)
        for block, (row, column) in choose_cells(hits).items()
    ]


def page_of(
    shape: tuple[int, int], *, groups: tuple[str, ...] = ("normal", "abnormal"), z: float = 1.5, title: str = "results"
) -> Page:
    """A page of a map with as many tiles of each group in a cell as chance says."""
    hits = {name: hits_of(shape, seed) for seed, name in enumerate(groups)}
    return _page(
        np.random.default_rng(9).uniform(0.5, 3, shape),
        np.full(shape, z),
        hits,
        tiles_of(sum(hits.values()), z),
        header=(title, f"123 tiles of {title}"),
        tile_mpp=0.5,
    )


@pytest.mark.parametrize(
    ("shape", "groups", "z"),
    [
        ((2, 2), ("all",), float("nan")),
        ((2, 60), ("z up to 2", "z above 2"), -1.5),
        ((60, 2), ("normal", "macro", "itc", "without label"), 9.5),
        ((22, 23), ("normal", "abnormal"), 1.5),
        ((9, 14), tuple(f"A hospital with a name as long as hospitals have it, {i}" for i in range(8)), 1.5),
    ],
)
def test_no_text_meets_another_or_a_picture(
    shape: tuple[int, int],
    groups: tuple[str, ...],
    z: float,
    require_readable: Callable[..., None],
    long_name: str,
) -> None:
    """Whatever the shape of the map, with or without z, and with names that are too long."""
    page = page_of(shape, groups=groups, z=z, title=long_name)
    require_readable(page, page.axes.images)


def test_the_page_says_how_many_tiles_each_group_and_cell_has(texts: Callable[[Page], list[str]]) -> None:
    """And which cell is which."""
    words = texts(page_of((4, 5)))
    for seed, name in enumerate(("normal", "abnormal")):
        assert f"{name}: {hits_of((4, 5), seed).sum()} tiles" in words
    both = hits_of((4, 5), 0) + hits_of((4, 5), 1)
    assert words.count("row 1, column 2") == int(both[1, 2] > 0)
    assert sum(word.startswith("row ") for word in words) == (both > 0).sum()
    assert f"z 1.5 · {both[1, 2]} tiles" in words


def test_without_z_there_is_no_map_of_it(texts: Callable[[Page], list[str]]) -> None:
    """And each tile says so."""
    with_z, without = (texts(page_of((4, 5), z=z)) for z in (-0.01, float("nan")))
    assert "Mean z" in with_z
    assert "Mean z" not in without
    assert any(word.startswith("no z") for word in without)
    assert any(word.startswith("z 0.0") for word in with_z)


def test_the_more_the_darker() -> None:
    """Distances, hits and z alike; what has no z is white."""
    rising = np.linspace(0, 6, 12).reshape(3, 4)
    mean_z = np.where(rising > 5.9, np.nan, rising)
    borders, z, hits = _panels(rising, mean_z, {"all": np.arange(12).reshape(3, 4)})
    for panel in (borders, hits):
        lightness = panel.colours.reshape(-1, 3).mean(axis=1)
        assert (np.diff(lightness) < 0).all()
    assert z.colours[2, 3].tolist() == [255, 255, 255]
    assert (np.diff(z.colours[..., 1].ravel()[:-1].astype(int)) < 0).all()
    assert hits.frame == (2, 3)
    assert hits.ends[1] == "17 % in a cell"


def test_a_group_without_tiles_is_blank() -> None:
    """And no cell has most of them."""
    panel = _panels(np.ones((3, 4)), np.full((3, 4), np.nan), {"z above 2": np.zeros((3, 4), np.int64)})[1]
    assert panel.frame is None
    assert len(np.unique(panel.colours.reshape(-1, 3), axis=0)) == 1


def test_of_each_block_the_cell_with_most_tiles_is_shown() -> None:
    """Blocks are square; one without tiles shows nothing."""
    hits = np.zeros((9, 20), np.int64)
    hits[1, 1], hits[0, 1], hits[8, 19] = 5, 4, 1
    assert choose_cells(hits) == {(0, 0): (1, 1), (4, 9): (8, 19)}


@pytest.mark.parametrize("shape", [(2, 2), (7, 10), (8, 10), (22, 23), (60, 60), (60, 2)])
def test_at_most_seven_by_ten_tiles_are_shown(shape: tuple[int, int]) -> None:
    """All cells where they are few."""
    blocks = choose_cells(np.ones(shape, np.int64))
    assert max(row for row, _ in blocks) < 7
    assert max(column for _, column in blocks) < 10
    assert shape[0] > 7 or shape[1] > 10 or len(blocks) == shape[0] * shape[1]


def test_the_picture_shows_the_tiles_and_a_frame(tmp_path: Path) -> None:
    """Their pixels are there, and equal input is an equal file."""
    hits = np.zeros((3, 4), np.int64)
    hits[1, 2] = 7
    for name in ("one.png", "two.png"):
        write_typicality_page(
            tmp_path / name,
            u_matrix=np.ones((3, 4)),
            mean_z=np.where(hits > 0, 9.0, np.nan),
            hits={"all": hits},
            prototypes=tiles_of(hits, 9.0),
            title="results",
            header="7 tiles",
            tile_mpp=0.5,
        )
    with Image.open(tmp_path / "one.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert 80_000 < (pixels == BLUE_TILE[0, 0]).all(axis=1).sum() <= 300 * 300
    assert (pixels == [int(ORANGE[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=1).sum() > 200
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]
