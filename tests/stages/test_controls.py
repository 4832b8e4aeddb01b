from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsi_anomaly.annotations import SlideLabel
from wsi_anomaly.cohort import CohortSlide
from wsi_anomaly.imaging.geometry import Grid, area_fraction
from wsi_anomaly.imaging.tissue import TissueOptions, tissue_mask
from wsi_anomaly.stages.evaluate.controls import Controls, control_warnings, find_controls
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.protocol import Protocol
from wsi_anomaly.stages.mask import mask_slide
from wsi_anomaly.stages.tile import TileOptions, tile_slide
from wsi_anomaly.storage.arrays import read_array, read_attributes, write_arrays
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.tiles import TileStore

ROWS, COLUMNS, SIDE_PX = 12, 16, 16
ORIGIN_LEVEL0_PX = (4000, 2000)
GLASS, TISSUE = (243, 243, 243), (190, 120, 170)
BLOCK = (slice(3, 8), slice(8, 13))
"""Rows and columns of tiles that something is painted on; the left quarter of each slide is glass without tiles."""
INKS = {"blue": (40, 60, 170), "green": (30, 130, 70), "black": (30, 30, 34), "red": (215, 35, 45)}

Colour = tuple[int, int, int]
Painted = Callable[..., Evidence]


def block(*, inner: bool = False) -> np.ndarray:
    """The tiles of the block, or those with none but such neighbours."""
    tiles = np.zeros((ROWS, COLUMNS), np.bool_)
    rows, columns = BLOCK
    tiles[rows, columns] = not inner
    tiles[rows.start + 1 : rows.stop - 1, columns.start + 1 : columns.stop - 1] = True
    return tiles[:, COLUMNS // 4 :].ravel()


@pytest.fixture
def painted(tmp_path: Path) -> Painted:
    """A slide of tissue with a block of another colour: `painted(colour, slide_id, z=, share=, glass=, **attributes)`.

    An array is taken for the pixels of the block instead.
    """

    def paint(
        colour: Colour | np.ndarray | None,
        slide_id: str = "node",
        *,
        z: np.ndarray | None = None,
        share: np.ndarray | None = None,
        glass: Colour = GLASS,
        unreadable: bool = False,
        **attributes: Any,
    ) -> Evidence:
        overview = np.full((ROWS * SIDE_PX, COLUMNS * SIDE_PX, 3), TISSUE, np.float64)
        overview[:, : COLUMNS // 4 * SIDE_PX] = glass
        place = tuple(slice(one.start * SIDE_PX, one.stop * SIDE_PX) for one in BLOCK)
        overview[place] = overview[place] if colour is None else colour
        overview += np.random.default_rng(0).normal(0, 2, overview.shape)
        readable = np.ones(overview.shape[:2], np.bool_)
        readable[place] = not unreadable
        folder = RunFolder(tmp_path).slide(slide_id)
        folder.root.mkdir(parents=True)
        write_arrays(
            folder.tissue,
            {"overview": np.clip(overview, 0, 255).astype(np.uint8), "readable": readable},
            {"overview_downsample": [16.0, 16.0], "mpp": [0.5, 0.5]} | attributes,
        )
        return evidence_of(folder, z, share)

    return paint


def evidence_of(folder: SlideFolder, z: np.ndarray | None, share: np.ndarray | None) -> Evidence:
    """Tiles right of the glass, with z around 0 unless it is given, on a slide whose bounds begin somewhere."""
    bounds = (*ORIGIN_LEVEL0_PX, COLUMNS * 256, ROWS * 256)
    grid = Grid.over(bounds, downsample=(1.0, 1.0), tile_px=256, stride_px=256)
    cells = grid.cells()[grid.cells()[:, 1] >= COLUMNS // 4]
    share = np.zeros(len(cells)) if share is None else share.astype(np.float64)
    return Evidence(
        folder.slide_id,
        SlideLabel(abnormal=bool(share.any())),
        share,
        z_tile=np.random.default_rng(1).normal(0, 1, len(cells)) if z is None else z.astype(np.float64),
        ranks=None,
        cells=cells,
        tile_grid=grid,
        cell_um=128.0,
        folder=folder,
        annotation=None,
    )


def controls(one: Evidence) -> Controls:
    """Those of a slide that has them."""
    found = find_controls(one)
    assert found is not None
    return found


@pytest.mark.parametrize("glass", [GLASS, (245, 236, 240), (228, 231, 231)])
def test_tiles_of_glass_are_told_from_tissue(painted: Painted, glass: Colour) -> None:
    """Whatever tint the lamp has; at the rim of the hole a tile may go either way."""
    found = controls(painted(glass, glass=glass))
    assert found.glass[block(inner=True)].all()
    assert not found.glass[~block()].any()
    assert not found.pen.any()


@pytest.mark.parametrize("ink", INKS)
def test_tiles_of_ink_are_told_from_tissue(painted: Painted, ink: str) -> None:
    """Each colour of felt pens."""
    found = controls(painted(INKS[ink]))
    assert found.pen[block(inner=True)].all()
    assert not found.pen[~block()].any()
    assert not found.glass.any()


@pytest.mark.parametrize(
    "colour",
    [(238, 222, 234), (215, 218, 230), (200, 75, 95), (220, 60, 110), (150, 105, 75), (60, 40, 25), (70, 45, 120)],
    ids=["pale eosin", "pale counterstain", "blood", "fast red", "DAB", "dense DAB", "lymphoid"],
)
def test_no_stain_is_taken_for_glass_or_ink(painted: Painted, colour: Colour) -> None:
    """Neither the palest nor the most saturated."""
    assert not controls(painted(colour)).either.any()


def test_fat_is_tissue(painted: Painted) -> None:
    """Though nine tenths of it are as empty as glass."""
    fat = np.full((5 * SIDE_PX, 5 * SIDE_PX, 3), GLASS)
    fat[::10] = fat[:, ::10] = (229, 196, 216)  # a wall of half a pixel around cells of 80 µm
    assert not controls(painted(fat)).either.any()


def test_only_scored_and_readable_tiles_are_controls(painted: Painted) -> None:
    """What nobody could read is painted as glass, but may be anything."""
    z = np.where(block(), np.nan, 0.0)
    assert not controls(painted(GLASS, z=z)).either.any()
    assert not controls(painted(GLASS, "unreadable", unreadable=True)).either.any()


def test_a_slide_without_a_bright_picture_has_no_controls(painted: Painted, tmp_path: Path) -> None:
    """Fluorescence is as dark as black ink; and there may be no picture at all."""
    dark, missing, damaged = painted(GLASS, "dark", brightfield=False), painted(GLASS, "missing"), painted(GLASS, "cut")
    write_arrays(tmp_path / "other" / "tissue.zarr", {"readable": np.ones((1, 1), np.bool_)}, {})
    missing = replace(missing, folder=SlideFolder(tmp_path / "other"))
    chunk = next(path for path in (damaged.folder.tissue / "overview" / "c").rglob("*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:100])
    nowhere = replace(missing, folder=SlideFolder(tmp_path / "nowhere"))
    slides = [dark, missing, damaged, nowhere]
    assert [find_controls(one) for one in slides] == [None] * 4
    assert control_warnings(slides, Protocol()) == ()


def test_nothing_is_said_where_there_is_no_control(painted: Painted) -> None:
    """Tissue throughout."""
    assert control_warnings([painted(None)], Protocol()) == ()


def test_controls_are_counted_with_their_share_above_the_threshold(painted: Painted) -> None:
    """Glass and ink apart, at the protocol's threshold."""
    half = np.where(np.arange(len(block())) % 2, 1.0, -1.0)
    slides = [painted(GLASS, "one", z=half), painted(GLASS, "two", z=half), painted(INKS["red"], "three", z=half + 5)]
    glass = [half[controls(one).glass] for one in slides]
    count, above = sum(map(len, glass)), np.concatenate(glass)
    lines = control_warnings(slides, Protocol())
    assert f"scored tiles of only glass: {count} on 2 slides, {(above > 0).mean():.0%} of them above z = 0" in lines
    assert any(line.startswith("scored tiles of only pen: ") and "on 1 slides, 100%" in line for line in lines)
    lines = control_warnings(slides, Protocol(threshold_z=1.5))
    assert f"scored tiles of only glass: {count} on 2 slides, 0% of them above z = 1.5" in lines


def test_slides_that_are_highest_on_a_control_are_named(painted: Painted) -> None:
    """Not those whose highest tile is tissue, nor where all are equal."""
    low = np.random.default_rng(0).normal(0, 0.1, len(block()))
    elsewhere = low.reshape(ROWS, -1).copy()
    elsewhere[9:12, 1:4] = 9
    slides = [
        painted(INKS["blue"], "fooled", z=np.where(block(), 5, low)),
        painted(INKS["blue"], "right", z=np.where(block(), 5, elsewhere.ravel())),
        painted(INKS["blue"], "even", z=np.ones(len(low))),
        painted(None, "tissue", z=np.where(block(), 5, low)),
    ]
    lines = [line for line in control_warnings(slides, Protocol()) if "highest" in line]
    assert lines == ["the highest eroded z lies on glass or pen on 1 of 4 slides: fooled"]


@pytest.mark.parametrize(("colour", "kind"), [(GLASS, "glass"), (INKS["green"], "pen")])
def test_a_detector_that_answers_to_controls_is_told_of(painted: Painted, colour: Colour, kind: str) -> None:
    """Where their median z is above that of what is annotated as abnormal."""
    tumour = np.zeros((ROWS, COLUMNS - COLUMNS // 4))
    tumour[9:12, 1:4] = 1
    for z_control, z_tumour in ((3.0, 2.0), (2.0, 3.0)):
        z = np.where(block(), z_control, np.where(tumour.ravel() > 0, z_tumour, 0.0))
        one = painted(colour, f"sick_{z_tumour:g}", z=z, share=tumour.ravel())
        told = f"the detector answers to {kind}: median z 3.00 there, 2.00 on annotated abnormal tiles"
        assert (told in control_warnings([one], Protocol())) == (z_control > z_tumour)


def test_glass_within_an_outline_is_not_the_abnormality_to_compare_with(painted: Painted) -> None:
    """An annotation often covers a lumen; nothing else is annotated here."""
    one = painted(GLASS, z=np.where(block(), 3.0, 0.0), share=block(inner=True))
    assert not any("answers" in line for line in control_warnings([one], Protocol()))


def tiled(slide: CohortSlide, folder: SlideFolder) -> Evidence:
    """A true slide after the stages `mask` and `tile`."""
    mask_slide(slide, folder, TissueOptions())
    tile_slide(slide, folder, TileOptions())
    store = TileStore(folder.tiles)
    count = len(store)
    return Evidence(
        slide.slide_id,
        SlideLabel(abnormal=False),
        np.zeros(count),
        z_tile=np.zeros(count),
        ranks=None,
        cells=store.places.cells,
        tile_grid=store.grid,
        cell_um=128.0,
        folder=folder,
        annotation=None,
    )


def test_a_true_slide_has_controls_only_where_a_mask_of_glass_asks_for_it(shared_data: Path, tmp_path: Path) -> None:
    """The automatic mask leaves none; of a mask of everything, tiles without tissue at full resolution are found."""
    path = shared_data / "slides" / "cmu-1-small-region.svs"
    slide = CohortSlide("cmu-1", path)
    assert not controls(tiled(slide, SlideFolder(tmp_path / "tissue"))).either.any()
    Image.new("L", (555, 742), 255).save(tmp_path / "all.png")
    one = tiled(replace(slide, mask=tmp_path / "all.png"), SlideFolder(tmp_path / "all"))
    attributes = read_attributes(one.folder.tissue)
    tissue = tissue_mask(read_array(one.folder.tissue, "overview"), TissueOptions(max_hole_um2=0.0))
    boxes = one.tile_boxes / np.tile(attributes["overview_downsample"], 2)
    fraction, found = area_fraction(tissue, boxes), controls(one)
    assert fraction[found.glass].max() < 0.05
    assert found.glass[fraction == 0].mean() > 0.85
    assert found.glass.sum() > 30
    assert not found.pen.any()
