import io
import tracemalloc
from pathlib import Path

import numpy as np
import openslide
import pytest
import skimage.data
import tifffile
from PIL import Image
from pydantic import ValidationError
from scipy import ndimage, spatial

from wsi_anomaly.imaging.tissue import TissueOptions, looks_brightfield, pen_mask, tissue_mask

Picture = np.ndarray
Mask = np.ndarray
Colour = tuple[int, int, int]

SIDE = 400
GLASS = (243, 243, 243)
OPTIONS = TissueOptions()


def disk(x: float, y: float, radius: float) -> Mask:
    """A filled circle as a mask of the standard picture."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def painting(*painted: tuple[Mask, Colour], glass: Colour = GLASS) -> Picture:
    """Glass with (mask, colour) pairs painted on it, without noise."""
    pixels = np.broadcast_to(np.float32(glass), (SIDE, SIDE, 3)).copy()
    for mask, colour in painted:
        pixels[mask] = colour
    return pixels


def scanned(pixels: Picture, *, noise: float = 2.0, jpeg: int | None = None) -> Picture:
    """The picture as a scanner gives it: with noise and, if asked for, JPEG of that quality with halved colours."""
    generator = np.random.default_rng(7)
    noisy = np.clip(np.round(pixels + generator.normal(0, noise, pixels.shape)), 0, 255).astype(np.uint8)
    if jpeg is None:
        return noisy
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=jpeg, subsampling=2)
    return np.asarray(Image.open(stream))


def overlap(one: Mask, other: Mask) -> float:
    """Intersection over union."""
    return np.count_nonzero(one & other) / np.count_nonzero(one | other)


def fat(mpp: float, *, size_um: int = 2400, cell_um: int = 80, wall_um: int = 4) -> Picture:
    """Adipocytes as the cells of a Voronoi diagram with thin pink walls, seen at `mpp`."""
    generator = np.random.default_rng(1)
    centres = np.stack(np.mgrid[: size_um // cell_um, : size_um // cell_um], axis=-1).reshape(-1, 2) + 0.5
    centres = (centres + generator.uniform(-0.35, 0.35, centres.shape)) * cell_um
    points = np.stack(np.mgrid[:size_um:2, :size_um:2], axis=-1).reshape(-1, 2)
    nearest, second = spatial.cKDTree(centres).query(points, k=2)[0].T
    wall = (second - nearest < wall_um).reshape(size_um // 2, size_um // 2, 1)
    side = round(size_um / mpp)
    fine = np.where(wall, (215, 150, 190), GLASS).astype(np.uint8)
    return np.asarray(Image.fromarray(fine).resize((side, side), Image.Resampling.BOX)).astype(np.float32)


def stroke(pixels: Picture, colour: Colour) -> tuple[Picture, Mask]:
    """The picture seen through a felt pen's soft-edged diagonal stroke, and the part the ink covers by half or more."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    ink = ndimage.gaussian_filter((np.abs(columns - rows * 0.5 - 110) < 9).astype(np.float32), 1.2)[..., None]
    return pixels * (1 - ink + ink * np.float32(colour) / 243), ink[..., 0] >= 0.5


def shrunk(image: Image.Image, mpp: float, to_mpp: float = 8.0) -> Picture:
    """An image brought to the resolution of an overview."""
    size = tuple(max(1, round(side * mpp / to_mpp)) for side in image.size)
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX))


def slide_overview(path: Path, mpp: float, level: int = 0) -> Picture:
    """One level of a slide at overview resolution, on white where it is transparent."""
    with openslide.OpenSlide(path) as slide:
        pixels = slide.read_region((0, 0), level, slide.level_dimensions[level])
        on_white = Image.new("RGBA", pixels.size, "white")
        on_white.alpha_composite(pixels)
        return shrunk(on_white, mpp * slide.level_downsamples[level])


COMPRESSION = pytest.mark.parametrize("jpeg", [None, 75, 50])


@COMPRESSION
@pytest.mark.parametrize("noise", [1, 3, 5])
@pytest.mark.parametrize("tint", [(243, 243, 243), (245, 236, 240), (228, 231, 231)])
def test_an_empty_slide_has_no_tissue(tint: Colour, noise: float, jpeg: int | None) -> None:
    """Neither the noise of a scanner nor a tinted lamp is tissue."""
    assert not tissue_mask(scanned(painting(glass=tint), noise=noise, jpeg=jpeg), OPTIONS).any()


@COMPRESSION
def test_dark_corners_and_a_drift_of_the_tint_are_not_tissue(jpeg: int | None) -> None:
    """Vignetting darkens without colour, a drifting lamp colours without darkening."""
    rows, columns = np.mgrid[:SIDE, :SIDE] / (SIDE / 2) - 1
    corners = painting() * (1 - 0.1 * (rows**2 + columns**2))[..., None]
    drift = painting() + 3 * np.stack([columns, 0 * rows, -rows], axis=-1)
    for empty in (corners, drift):
        assert not tissue_mask(scanned(empty, jpeg=jpeg), OPTIONS).any()


@COMPRESSION
@pytest.mark.parametrize(
    "colour",
    [(238, 225, 235), (215, 218, 230), (230, 222, 210), (75, 75, 140), (70, 45, 120), (150, 105, 75), (60, 40, 25)],
    ids=["pale eosin", "pale counterstain", "pale DAB", "IHC lymphoid", "H&E lymphoid", "DAB", "dense DAB"],
)
def test_tissue_of_every_stain_is_found(colour: Colour, jpeg: int | None) -> None:
    """The mask is the stained disk, with a margin of no more than 40 µm."""
    tissue = disk(200, 200, 110)
    found = tissue_mask(scanned(painting((tissue, colour)), jpeg=jpeg), OPTIONS)
    assert np.count_nonzero(tissue & ~found) < 0.02 * np.count_nonzero(tissue)
    assert np.count_nonzero(found & ~disk(200, 200, 115)) < 0.003 * np.count_nonzero(tissue)


@COMPRESSION
def test_pale_tissue_is_found_beside_strongly_stained_tissue(jpeg: int | None) -> None:
    """Otsu's threshold must not settle between pale and strong stain."""
    pale, strong = disk(250, 250, 100), disk(70, 70, 55)
    found = tissue_mask(scanned(painting((pale, (238, 225, 235)), (strong, (110, 60, 140))), jpeg=jpeg), OPTIONS)
    assert overlap(found, pale | strong) > 0.93


@COMPRESSION
def test_a_picture_full_of_tissue_is_all_tissue(jpeg: int | None) -> None:
    """Without any glass there is nothing to separate."""
    texture = np.random.default_rng(3).normal(size=(SIDE, SIDE))
    texture = ndimage.gaussian_filter(texture, 4)[..., None] * np.float32((0.5, 1, 0.6))
    dense = (texture[..., :1] > 0) * np.float32((-80, -50, -25))
    for full in (
        painting(glass=(190, 110, 165)) + 150 * texture + dense,
        painting(glass=(230, 200, 220)) + 60 * texture,
    ):
        assert tissue_mask(scanned(full, jpeg=jpeg), OPTIONS).all()


@pytest.mark.parametrize(("mpp", "jpeg"), [(4, None), (8, None), (8, 70), (16, None), (29, None), (29, 70)])
def test_fat_is_tissue_at_every_resolution(mpp: float, jpeg: int | None) -> None:
    """Whether walls are resolved or not, the holes between them are not glass."""
    tissue = np.pad(fat(mpp), [(30, 30), (30, 30), (0, 0)], mode="constant", constant_values=243)
    found = tissue_mask(scanned(tissue, jpeg=jpeg), TissueOptions(mpp=mpp))
    margin = 30 + round(100 / mpp)
    assert found[margin:-margin, margin:-margin].mean() > 0.99
    outside = np.ones_like(found)
    outside[26:-26, 26:-26] = False
    assert not (found & outside).any()


def test_a_ring_keeps_its_glass_but_not_its_small_holes() -> None:
    """A cavity of a millimetre is glass, a vessel of 200 µm is part of the tissue."""
    cavity, vessel = disk(200, 200, 65), disk(200, 310, 12)
    ring = disk(200, 200, 150) & ~cavity & ~vessel
    found = tissue_mask(scanned(painting((ring, (200, 120, 170)))), OPTIONS)
    assert found[vessel].all()
    assert not found[disk(200, 200, 60)].any()


def test_the_options_set_the_smallest_island_and_the_largest_hole() -> None:
    """Areas are in µm², whatever the resolution."""
    island, hole = disk(60, 60, 10), disk(250, 250, 12)
    overview = scanned(painting((island, (200, 120, 170)), (disk(250, 250, 100) & ~hole, (200, 120, 170))))
    strict = tissue_mask(overview, TissueOptions(min_object_um2=50_000, max_hole_um2=5_000))
    lenient = tissue_mask(overview, TissueOptions(min_object_um2=0, max_hole_um2=50_000))
    assert not strict[island].any()
    assert not strict[250, 250]
    assert lenient[island].all()
    assert lenient[hole].all()


@pytest.mark.parametrize("options", [{"mpp": 0}, {"mpp": -8}, {"min_object_um2": -1}, {"max_hole_um2": -1}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    """A resolution is positive, an area not negative."""
    with pytest.raises(ValidationError):
        TissueOptions(**options)


@COMPRESSION
@pytest.mark.parametrize(
    "ink",
    [(20, 140, 60), (0, 130, 130), (30, 60, 180), (25, 30, 100), (40, 30, 160), (70, 120, 215), (30, 30, 35)],
    ids=["green", "teal", "blue", "navy", "ultramarine", "sky", "black"],
)
def test_pen_is_not_tissue_neither_on_glass_nor_over_tissue(ink: Colour, jpeg: int | None) -> None:
    """The stroke is cut out of the tissue and leaves no rim on the glass; the tissue beside it stays."""
    tissue, dense = disk(200, 200, 110), disk(260, 150, 50)
    drawn, covered = stroke(painting((tissue, (220, 150, 190)), (dense, (110, 60, 150))), ink)
    overview = scanned(drawn, jpeg=jpeg)
    found, pen = tissue_mask(overview, OPTIONS), pen_mask(overview)
    glass = ~ndimage.binary_dilation(tissue | dense, iterations=8)
    stroke_middle = ndimage.binary_erosion(covered, iterations=2)
    assert np.count_nonzero(found & glass) < 0.01 * np.count_nonzero(covered)
    assert pen[stroke_middle & glass].all()
    assert pen[stroke_middle].mean() > 0.75
    near = ndimage.binary_dilation(covered, iterations=6)
    assert not (pen & ~near).any()
    assert found[(tissue | dense) & ~near].all()


def test_dust_and_cover_slip_edges_are_not_tissue() -> None:
    """Grey things lie on the slide, not in it."""
    edge, shadow = np.zeros((2, SIDE, SIDE), dtype=bool)
    edge[200:204], shadow[300:310] = True, True
    grey = painting((disk(100, 100, 20), (150, 150, 148)), (edge, (120, 122, 120)), (shadow, (205, 208, 206)))
    assert not tissue_mask(scanned(grey), OPTIONS).any()


def test_what_could_not_be_read_counts_as_tissue_and_changes_nothing_else() -> None:
    """Whatever colour a reader leaves there, the rest of the mask is as if it were glass."""
    readable = ~disk(320, 320, 40)
    overview = scanned(painting((disk(150, 150, 90), (220, 150, 190))))
    expected = tissue_mask(overview, OPTIONS, readable=readable)
    for left in (0, 255, 90):
        damaged = np.where(readable[..., None], overview, np.uint8(left))
        found = tissue_mask(damaged, OPTIONS, readable=readable)
        assert found[~readable].all()
        np.testing.assert_array_equal(found, expected)
    assert overlap(expected & readable, disk(150, 150, 90)) > 0.95


@pytest.mark.parametrize("mpp", [2, 40, 300])
def test_any_resolution_of_the_overview_will_do(mpp: float) -> None:
    """Scales in µm may be many pixels or less than one."""
    tissue = disk(100, 100, 60)[:200, :200]
    overview = scanned(painting((disk(100, 100, 60), (220, 150, 190))))[:200, :200]
    assert overlap(tissue_mask(overview, TissueOptions(mpp=mpp, max_hole_um2=0)), tissue) > 0.8


def test_nothing_readable_is_all_tissue() -> None:
    """Unknown everywhere: the tile stage will say what is wrong."""
    assert tissue_mask(np.zeros((30, 40, 3), np.uint8), OPTIONS, readable=np.zeros((30, 40), dtype=bool)).all()


@pytest.mark.parametrize("colour", [0, 255])
def test_a_picture_of_one_colour_has_no_tissue(colour: int) -> None:
    """All black is what the scanner did not visit, all white is paint."""
    assert not tissue_mask(np.full((50, 60, 3), colour, np.uint8), OPTIONS).any()


def test_white_paint_around_the_scanned_field_does_not_make_tissue_of_its_glass() -> None:
    """The tint of glass is seen against the lamp, not against the paint."""
    field = painting((disk(200, 200, 60), (210, 130, 180)), glass=(242, 236, 240))
    overview = scanned(field)
    overview[:, :150] = 255
    found = tissue_mask(overview, OPTIONS)
    assert overlap(found, disk(200, 200, 60) & (np.arange(SIDE) >= 150)) > 0.93


@pytest.mark.parametrize("colour", [(225, 212, 222), (205, 208, 217), (200, 120, 170), (75, 75, 140)])
def test_the_mask_hardly_depends_on_the_brightness_of_the_lamp(colour: Colour) -> None:
    """Ten percent more or less light moves the outline, not the tissue."""
    overview = scanned(painting((disk(200, 200, 110), colour), glass=(228, 228, 228)), jpeg=80)
    expected = tissue_mask(overview, OPTIONS)
    for light in (0.9, 1.1):
        changed = np.clip(np.round(overview * light), 0, 255).astype(np.uint8)
        assert overlap(tissue_mask(changed, OPTIONS), expected) > 0.95


def test_strips_leave_no_seam() -> None:
    """A picture and the same picture turned over have the same mask, though the strips lie elsewhere."""
    overview = np.concatenate([scanned(painting((disk(200, 200, 110), (238, 225, 235))))] * 2)
    np.testing.assert_array_equal(tissue_mask(overview[::-1].copy(), OPTIONS)[::-1], tissue_mask(overview, OPTIONS))


def test_temporaries_stay_below_six_times_the_overview() -> None:
    """A slide of 100,000 pixels has an overview of half a gigabyte."""
    overview = np.tile(scanned(stroke(painting((disk(200, 200, 110), (220, 150, 190))), (30, 60, 180))[0]), (6, 6, 1))
    tracemalloc.start()
    try:
        tissue_mask(overview, OPTIONS)
        assert tracemalloc.get_traced_memory()[1] < 6 * overview.nbytes
    finally:
        tracemalloc.stop()


def test_a_real_immunostain_is_free_of_pen_and_found_on_glass() -> None:
    """Brown glands and blue stroma of a photograph, laid on glass."""
    stain = skimage.data.immunohistochemistry()
    assert not pen_mask(stain).any()
    overview = scanned(np.pad(stain.astype(np.float32), [(90, 90), (90, 90), (0, 0)], constant_values=236))
    found = tissue_mask(overview, OPTIONS)
    expected = np.pad(np.ones(stain.shape[:2], dtype=bool), 90)
    assert overlap(found, expected) > 0.9
    assert looks_brightfield(stain)


def test_the_aperio_region_is_outlined(shared_data: Path) -> None:
    """Skin: 40 % of the region, without the grains beside it."""
    overview = slide_overview(shared_data / "slides" / "cmu-1-small-region.svs", 0.499)
    found = tissue_mask(overview, OPTIONS)
    assert 0.38 < found.mean() < 0.47
    assert found[110:180, 55:75].all()
    assert not found[80:, :20].any()
    assert looks_brightfield(overview)


def test_a_single_speck_on_a_slide_survives(shared_data: Path) -> None:
    """50 µm of tissue count; the grey debris around them does not."""
    image = Image.fromarray(tifffile.imread(shared_data / "slides" / "kidney-48-5.tif")[..., :3])
    found = tissue_mask(shrunk(image, 0.5), OPTIONS)
    labels, count = ndimage.label(found)
    assert count == 1
    assert found[32, 21]
    assert np.count_nonzero(labels) < 60


def test_a_lymph_node_with_fat_dust_and_pen_is_outlined(shared_data: Path) -> None:
    """Node and fat are tissue; the hilum's cavity, dust, the cover slip and the pen are not."""
    with openslide.OpenSlide(shared_data / "slides" / "camelyon_overview.dcm") as slide:
        overview = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    found = tissue_mask(overview, TissueOptions(mpp=29))
    assert 0.42 < found.mean() < 0.45
    assert found[230:330, 180:400].all()  # node
    assert found[140:165, 430:480].all()  # fat
    assert found[400:480, 670:700].mean() > 0.95  # pale fat
    assert found[400:470, 430:500].mean() < 0.01  # cavity
    assert not found[640:800, 560:1100].any()  # glass with dust and an air bubble
    assert pen_mask(overview)[13:16, 200:220].mean() > 0.9


@pytest.mark.parametrize("name", ["centre_2_patient_056_node_1", "centre_3_patient_066_node_1"])
def test_a_region_inside_a_lymph_node_is_all_tissue_without_pen(shared_data: Path, name: str) -> None:
    """Dense blue-purple lymphoid tissue, in two laboratories' colours."""
    overview = shrunk(Image.open(shared_data / "regions" / f"{name}.jpeg"), 0.25)
    assert tissue_mask(overview, OPTIONS).mean() > 0.99
    assert not pen_mask(overview).any()
    assert looks_brightfield(overview)


def test_fluorescence_is_not_brightfield(shared_data: Path) -> None:
    """Dark background, one bright colour."""
    assert not looks_brightfield(slide_overview(shared_data / "slides" / "fluorescence 2 (560).ndpi", 0.228, level=5))


def test_black_where_the_scanner_was_not_does_not_hide_brightfield() -> None:
    """Some vendors paint black instead of white."""
    overview = scanned(painting((disk(300, 200, 60), (110, 60, 150))))
    overview[:, :250] = 0
    assert looks_brightfield(overview)
    assert not looks_brightfield(np.zeros_like(overview))


def test_glass_at_the_edge_of_a_small_slide_is_not_a_hole() -> None:
    """All glass of a biopsy's overview may be smaller than the largest hole that is filled."""
    overview = np.full((64, 64, 3), 243, np.uint8)
    overview[16:48, 16:48] = (150, 90, 160)
    mask = tissue_mask(overview, TissueOptions())
    assert not mask[:8].any()
    assert mask[20:44, 20:44].all()


def test_tinted_glass_beside_unscanned_white_is_not_tissue() -> None:
    """A stitched slide: the reader paints white what was not scanned, and the resampled rim runs between both."""
    overview = np.full((220, 260, 3), 255, np.uint8)
    overview[40:200, 20:240] = (241, 236, 239)
    overview[60:180, 50:210] = (200, 90, 150)
    noise = np.random.default_rng(0).normal(0, 1.5, overview.shape)
    blurred = ndimage.gaussian_filter(overview.astype(float) + noise * (overview < 255), (0.6, 0.6, 0))
    mask = tissue_mask(np.clip(np.rint(blurred), 0, 255).astype(np.uint8), TissueOptions())
    assert mask[70:170, 60:200].all()
    assert not mask[40:50, 20:240].any()
    assert not mask[:35].any()
