"""Slides: exact mpp, every source of mpp, backgrounds, bounds and damage, on small real files."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.transform import downscale_local_mean

from wsi_anomaly.errors import CorruptSlideError, MissingMppError, SlideError
from wsi_anomaly.slides import Slide, fingerprint
from wsi_anomaly.slides.recipe import choose_recipe
from wsi_anomaly.slides.resolution import find_resolution

_TAGS = {"tiff.ResolutionUnit": "INCH", "tiff.XResolution": "50800", "tiff.YResolution": "50800"}

WriteTiff = Callable[..., Path]
TileEdit = Callable[[Path, list[int]], None]


def block_means(pixels: np.ndarray, block: int) -> np.ndarray:
    """Pixels of `block` x `block` averaged, as floats."""
    return downscale_local_mean(pixels, (block, block, 1))


def mean_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean absolute difference in grey levels."""
    return float(np.abs(found.astype(float) - expected).mean())


# Reading at an exact mpp


@pytest.mark.parametrize("ome", [False, True])
def test_a_level_at_the_wanted_mpp_is_read_untouched(picture: np.ndarray, write_tiff: WriteTiff, *, ome: bool) -> None:
    """Without compression every pixel comes back as it was written, by OpenSlide and by TiffSlide."""
    with Slide.open(write_tiff(picture, mpp=0.5, ome=ome)) as slide:
        recipe = slide.recipe(0.5)
        assert recipe.resampling == "none"
        assert np.array_equal(slide.read((100, 50), (256, 128), recipe), picture[50:178, 100:356])


@pytest.mark.parametrize("ome", [False, True])
@pytest.mark.parametrize("mpp", [0.25, 0.4999, 0.2501])
def test_a_coarser_level_is_read_where_it_has_the_wanted_mpp(
    picture: np.ndarray, write_tiff: WriteTiff, mpp: float, *, ome: bool
) -> None:
    """The level at twice the mpp is used as it is, within a tolerance of one in a thousand."""
    path = write_tiff(picture, mpp=mpp, downsamples=(1, 2, 4), ome=ome)
    with Slide.open(path) as slide:
        recipe = slide.recipe(2 * mpp * 1.0005)
        assert (recipe.level, recipe.resampling) == (1, "none")
        expected = np.rint(block_means(picture, 2))[20:148, 60:188]
        assert mean_error(slide.read((120, 40), (128, 128), recipe), expected) == 0


@pytest.mark.parametrize("ome", [False, True])
@pytest.mark.parametrize("factor", [2, 3])
def test_resampling_equals_the_mean_of_the_pixels_without_a_shift(
    picture: np.ndarray, write_tiff: WriteTiff, factor: int, *, ome: bool
) -> None:
    """A shift by half a pixel would cost more than two grey levels in this picture."""
    expected = block_means(picture, factor)[40:104, 60:124]
    shifted = block_means(np.roll(picture, 1, axis=1), factor)[40:104, 60:124]
    assert mean_error(shifted, expected) > 1
    with Slide.open(write_tiff(picture, mpp=0.25, ome=ome)) as slide:
        pixels = slide.read((60 * factor, 40 * factor), (64, 64), slide.recipe(0.25 * factor))
    assert mean_error(pixels, expected) < 0.5


def test_resampling_to_an_odd_mpp_samples_the_right_places(write_tiff: WriteTiff) -> None:
    """On a ramp of one grey level every five pixels, a tile pixel has the value at its centre."""
    ramp = np.repeat(np.tile((np.arange(1200) // 5).astype(np.uint8), (300, 1))[..., None], 3, axis=2)
    with Slide.open(write_tiff(ramp, mpp=0.2275)) as slide:
        pixels = slide.read((101, 33), (128, 64), slide.recipe(0.5))
    centres = 101 + (np.arange(128) + 0.5) * 0.5 / 0.2275
    assert mean_error(pixels[:, :, 0], np.tile((centres - 0.5) / 5 - 0.4, (64, 1))) < 0.3


@pytest.mark.parametrize("ome", [False, True])
def test_a_level_of_rounded_size_is_read_in_place(picture: np.ndarray, write_tiff: WriteTiff, *, ome: bool) -> None:
    """Level sizes are rounded, so that their quotient is no whole number: what is read must not drift for that."""
    path = write_tiff(picture[:767, :1023], mpp=0.25, downsamples=(1, 4), ome=ome)
    with Slide.open(path) as slide:
        assert slide.size_level0_px[0] / slide.level_dimensions[1][0] > 4.01
        assert slide.level_downsamples == (1, 4)
        pixels = slide.read((480, 360), (64, 64), slide.recipe(1.5))
    assert mean_error(pixels, block_means(picture, 6)[60:124, 80:144]) < 0.6


@pytest.mark.parametrize("ome", [False, True])
def test_tiles_that_touch_show_no_seam(picture: np.ndarray, write_tiff: WriteTiff, *, ome: bool) -> None:
    """Two tiles side by side are the same pixels as one tile of twice the width."""
    noise = np.random.default_rng(0).integers(0, 256, picture.shape, np.uint8)
    with Slide.open(write_tiff(noise, mpp=0.2, ome=ome)) as slide:
        recipe = slide.recipe(0.5)
        both = slide.read((100, 100), (128, 64), recipe)
        left, right = (slide.read((x, 100), (64, 64), recipe) for x in (100, 260))
    assert np.abs(both.astype(int) - np.hstack([left, right])).max() <= 1


def test_reading_antialiases(write_tiff: WriteTiff) -> None:
    """A chessboard of single pixels becomes grey, not black, white or moiré."""
    board = np.repeat(((np.indices((512, 512)).sum(axis=0) % 2) * 255).astype(np.uint8)[..., None], 3, axis=2)
    with Slide.open(write_tiff(board, mpp=0.2)) as slide:
        pixels = slide.read((100, 100), (100, 100), slide.recipe(0.5))
    assert abs(pixels.astype(int) - 127).max() < 12


@pytest.mark.parametrize("ome", [False, True])
def test_equal_reads_from_many_threads_are_equal(picture: np.ndarray, write_tiff: WriteTiff, *, ome: bool) -> None:
    """What a tile shows depends on slide, origin and recipe alone."""
    path = write_tiff(picture, mpp=0.3, ome=ome, compression="jpeg")
    with Slide.open(path) as slide, ThreadPoolExecutor(8) as threads:
        recipe = slide.recipe(0.5)
        origins = [(x, y) for y in range(0, 500, 100) for x in range(0, 800, 100)]
        together = list(threads.map(lambda origin: slide.read(origin, (64, 64), recipe), origins))
        alone = [slide.read(origin, (64, 64), recipe) for origin in origins]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


@given(st.floats(0.1, 2), st.floats(0.2, 5), st.sampled_from([(1.0,), (1.0, 2.0, 4.0), (1.0, 3.9, 16.1)]))
def test_the_recipe_takes_the_coarsest_level_that_is_fine_enough(
    slide_mpp: float, mpp: float, downsamples: tuple[float, ...]
) -> None:
    """No finer level than needed, none enlarged where a finer one exists, and the downsample gives the mpp."""
    recipe = choose_recipe(
        mpp, slide_mpp=(slide_mpp,) * 2, downsamples=downsamples, max_upsampling=100.0, reader="openslide", name="a"
    )
    assert recipe.level == 0 or slide_mpp * downsamples[recipe.level] <= mpp * 1.001
    assert all(slide_mpp * coarser > mpp * 1.001 for coarser in downsamples[recipe.level + 1 :])
    assert math.isclose(recipe.downsample[0] * slide_mpp, mpp, rel_tol=1.1e-3)


def test_different_mpp_along_x_and_y_become_square_pixels(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """A slide stretched along x is read with a wider footprint there."""
    path = write_tiff(np.repeat(picture, 2, axis=1), mpp=None, resolution=(40_000, 20_000), resolutionunit="CENTIMETER")
    with Slide.open(path) as slide:
        assert slide.mpp == (0.25, 0.5)
        recipe = slide.recipe(0.5)
        assert mean_error(slide.read((200, 100), (64, 64), recipe), picture[100:164, 100:164]) < 0.6


def test_a_slide_too_coarse_is_refused_with_both_mpp(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """Enlarging up to one and a half times is allowed, more is not unless asked for."""
    with Slide.open(write_tiff(picture, mpp=0.8)) as slide:
        with pytest.raises(SlideError, match=r"slide\.tif.*0\.8 µm/px.*0\.5 µm/px"):
            slide.recipe(0.5)
        assert slide.recipe(0.5, max_upsampling=2.0).level == 0
        assert slide.recipe(0.54).resampling == "bicubic antialiased"


@pytest.mark.parametrize("mpp", [0.0, -0.5, math.nan, math.inf])
def test_an_impossible_wanted_mpp_is_refused(picture: np.ndarray, write_tiff: WriteTiff, mpp: float) -> None:
    """Zero, negative and endless mpp have no recipe."""
    with Slide.open(write_tiff(picture)) as slide, pytest.raises(SlideError, match="positive"):
        slide.recipe(mpp)


# Where mpp comes from


@pytest.mark.parametrize(
    ("properties", "given_mpp", "mpp", "source"),
    [
        ({"mpp-x": "0.25", "mpp-y": "0.26", "objective-power": "20"}, None, (0.25, 0.26), "metadata"),
        (_TAGS | {"objective-power": "40"}, None, (0.5, 0.5), "tiff tags"),
        ({"objective-power": "40"}, None, (0.25, 0.25), "objective power"),
        ({}, 0.46, (0.46, 0.46), "user"),
        ({"mpp-x": "0.25", "mpp-y": "0.25"}, 0.252, (0.25, 0.25), "metadata"),
    ],
)
def test_mpp_comes_from_the_best_source(
    properties: dict[str, str], given_mpp: float | None, mpp: tuple[float, float], source: str
) -> None:
    """Metadata, then TIFF tags, then objective power, then the user; silently where nothing disagrees."""
    found = find_resolution(properties, vendor="aperio", name="a.svs", given_mpp=given_mpp)
    assert (found.source, found.warnings) == (source, ())
    assert found.mpp == pytest.approx(mpp)


@pytest.mark.parametrize("absurd", ["0", "-0.25", "nan", "inf", "0.001", "250", "0,25"])
def test_absurd_metadata_is_passed_over_with_a_warning(absurd: str) -> None:
    """The next source is asked, and the warning names slide and source."""
    properties = {"mpp-x": absurd, "mpp-y": "0.25", "objective-power": "20"}
    found = find_resolution(properties, vendor="aperio", name="a.svs", given_mpp=None)
    assert (found.mpp, found.source) == ((0.5, 0.5), "objective power")
    assert len(found.warnings) == 1
    assert "a.svs" in found.warnings[0]
    assert "metadata" in found.warnings[0]


def test_an_objective_power_of_zero_is_passed_over() -> None:
    """It would mean an endless mpp."""
    found = find_resolution({"objective-power": "0"}, vendor="aperio", name="a", given_mpp=0.5)
    assert found.source == "user"
    assert len(found.warnings) == 1


@pytest.mark.parametrize("dpi", [72, 96, 150, 300, 600])
def test_print_resolutions_are_not_taken_for_mpp(picture: np.ndarray, write_tiff: WriteTiff, dpi: int) -> None:
    """An image program wrote them; the error says so, and the user's mpp is used where given."""
    path = write_tiff(picture, mpp=None, resolution=(dpi, dpi), resolutionunit="INCH")
    with pytest.raises(MissingMppError, match=r"cannot be right.*--mpp"):
        Slide.open(path)
    with Slide.open(path, mpp=0.5) as slide:
        assert (slide.mpp, slide.mpp_source) == ((0.5, 0.5), "user")
        assert "cannot be right" in slide.warnings[0]


def test_tags_of_a_plain_tiff_are_named_as_the_source(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """OpenSlide repeats them as its own mpp, which they are not."""
    with Slide.open(write_tiff(picture, mpp=0.5)) as slide:
        assert (slide.mpp, slide.mpp_source, slide.vendor) == ((0.5, 0.5), "tiff tags", "generic-tiff")


def test_the_file_wins_over_the_user_and_a_warning_says_so(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """Two percent apart is agreement, three percent is not."""
    path = write_tiff(picture, mpp=0.5)
    with Slide.open(path, mpp=0.509) as slide:
        assert slide.warnings == ()
    with Slide.open(path, mpp=0.515) as slide:
        assert slide.mpp == (0.5, 0.5)
        assert "0.515" in slide.warnings[0]


def test_missing_mpp_says_how_to_give_it(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """Both ways are named."""
    with pytest.raises(MissingMppError, match=r"slide\.tif.*--mpp.*column"):
        Slide.open(write_tiff(picture, mpp=None))


@pytest.mark.parametrize("mpp", [0.0, -1.0, math.nan, math.inf, 500.0])
def test_an_absurd_mpp_from_the_user_is_refused(picture: np.ndarray, write_tiff: WriteTiff, mpp: float) -> None:
    """Even where the file knows better: the user's table is wrong."""
    with pytest.raises(SlideError, match="cannot be right"):
        Slide.open(write_tiff(picture), mpp=mpp)


@pytest.mark.parametrize(("size", "unit"), [(0.5, "µm"), (0.5, "\u03bcm"), (0.5, "&#181;m"), (500, "nm"), (5e-4, "mm")])
def test_ome_sizes_are_read_in_every_spelling_of_the_unit(size: float, unit: str) -> None:
    """The micro sign, the Greek letter and an XML entity mean the same; no unit means microns."""
    description = (
        f'<OME><Image><Pixels PhysicalSizeX="{size}" PhysicalSizeXUnit="{unit}" PhysicalSizeY="0.25"/></Image></OME>'
    )
    found = find_resolution({"tiff.ImageDescription": description}, vendor="ome-tiff", name="a", given_mpp=None)
    assert (found.mpp, found.source) == ((0.5, 0.25), "metadata")


# Formats


def test_an_ome_tiff_with_its_pyramid_in_subifds_shows_all_levels(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """OpenSlide would open it as one level without mpp, so TiffSlide reads it."""
    path = write_tiff(picture, name="slide.ome.tif", mpp=0.25, downsamples=(1, 2, 4), ome=True, compression="jpeg")
    with Slide.open(path) as slide:
        assert (slide.reader, slide.vendor) == ("tiffslide", "ome-tiff")
        assert slide.level_dimensions == ((1024, 768), (512, 384), (256, 192))
        assert (slide.mpp, slide.mpp_source) == ((0.25, 0.25), "metadata")


def test_a_tiff_in_strips_is_read_by_tiffslide(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """OpenSlide refuses plain TIFF without tiles."""
    with Slide.open(write_tiff(picture, tile=None, rowsperstrip=64)) as slide:
        assert slide.reader == "tiffslide"
        assert np.array_equal(slide.read((3, 5), (99, 77), slide.recipe(0.5)), picture[5:82, 3:102])


def test_grey_pixels_become_rgb(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """In strips, so that TiffSlide reads it."""
    with Slide.open(write_tiff(picture[..., 0], tile=None, photometric="minisblack")) as slide:
        pixels = slide.read((0, 0), (64, 64), slide.recipe(0.5))
    assert np.array_equal(pixels, np.repeat(picture[:64, :64, :1], 3, axis=2))


def test_pixels_of_more_than_eight_bits_in_strips_are_refused(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """Their brightness range cannot be guessed; the message says what to convert to."""
    with pytest.raises(SlideError, match="8-bit RGB"):
        Slide.open(write_tiff(picture.astype(np.uint16), tile=None))


# Background and bounds


@pytest.mark.parametrize("ome", [False, True])
@pytest.mark.parametrize("mpp", [0.5, 1.0])
def test_what_overhangs_the_slide_has_the_background_colour(
    picture: np.ndarray, write_tiff: WriteTiff, mpp: float, *, ome: bool
) -> None:
    """On all four sides, and where nothing of the slide is left."""
    with Slide.open(write_tiff(picture, ome=ome)) as slide:
        recipe = slide.recipe(mpp)
        factor = round(mpp / 0.5)
        corner = slide.read((-32 * factor, -32 * factor), (64, 64), recipe)
        end = slide.read((1024 - 32 * factor, 768 - 32 * factor), (64, 64), recipe)
        nowhere = slide.read((5000, -5000), (64, 64), recipe)
    assert (corner[:30] == 255).all()
    assert (corner[:, :30] == 255).all()
    assert mean_error(corner[34:, 34:], block_means(picture, factor)[2:32, 2:32]) < 1
    assert (end[34:] == 255).all()
    assert (end[:, 34:] == 255).all()
    assert (nowhere == 255).all()


@pytest.mark.parametrize("ome", [False, True])
def test_transparent_pixels_become_the_background_colour(
    picture: np.ndarray, write_tiff: WriteTiff, drop_tiles: TileEdit, *, ome: bool
) -> None:
    """A tile that the file lacks is white, not black."""
    path = write_tiff(picture, ome=ome)
    drop_tiles(path, [1])
    with Slide.open(path) as slide:
        pixels = slide.read((200, 10), (100, 100), slide.recipe(0.5))
    assert np.array_equal(pixels[:, :56], picture[10:110, 200:256])
    assert (pixels[:, 56:] == 255).all()


def test_half_transparent_pixels_are_mixed_with_the_background(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """Alpha is applied, not cut off."""
    alpha = np.full((*picture.shape[:2], 1), 128, np.uint8)
    path = write_tiff(np.dstack([picture, alpha]), tile=None, extrasamples=["unassalpha"])
    with Slide.open(path) as slide:
        pixels = slide.read((0, 0), (64, 64), slide.recipe(0.5))
    assert mean_error(pixels, picture[:64, :64] * (128 / 255) + 127) < 1


def test_bounds_of_a_sparse_slide_are_those_of_its_tiles(
    picture: np.ndarray, write_tiff: WriteTiff, drop_tiles: TileEdit
) -> None:
    """Of 4 x 3 tiles only the two in the middle are left; the overview shows them alone."""
    path = write_tiff(picture)
    drop_tiles(path, [tile for tile in range(12) if tile not in (5, 6)])
    with Slide.open(path) as slide:
        assert slide.has_bounds
        assert slide.bounds_level0_px == (256, 256, 512, 256)
        assert slide.size_level0_px == (1024, 768)
        rgb, readable = slide.overview(2.0)
    assert rgb.shape == (64, 128, 3)
    assert readable.all()
    assert mean_error(rgb[1:-1, 1:-1], block_means(picture, 4)[65:127, 65:191]) < 1


def test_a_slide_without_bounds_has_all_of_level_0(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """So that nobody has to ask twice."""
    with Slide.open(write_tiff(picture)) as slide:
        assert not slide.has_bounds
        assert slide.bounds_level0_px == (0, 0, 1024, 768)


# Overview


@pytest.mark.parametrize("downsamples", [(1,), (1, 4)])
def test_the_overview_is_the_mean_of_the_slide_without_seams(
    write_tiff: WriteTiff, downsamples: tuple[int, ...]
) -> None:
    """Wider than one block, from one level or two; the picture that is expected comes from numpy."""
    y, x = np.mgrid[0:600, 0:5000]
    wide = np.stack([128 + 100 * np.sin(x / 90), 128 + 100 * np.sin(y / 70), np.full(x.shape, 90)], axis=-1)
    wide = np.rint(wide).astype(np.uint8)
    with Slide.open(write_tiff(wide, mpp=0.5, downsamples=downsamples)) as slide:
        rgb, readable = slide.overview(4.0)
    expected = block_means(wide, 8)
    assert readable.all()
    assert rgb.shape == expected.shape
    assert np.abs(rgb[2:-2, 2:-2] - expected[2:-2, 2:-2]).max() < 1.5


def test_a_slide_too_coarse_to_read_still_has_an_overview(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """A picture of the slide helps to see why it was refused."""
    with Slide.open(write_tiff(picture, mpp=16.0)) as slide:
        rgb, readable = slide.overview(8.0)
    assert rgb.shape == (1536, 2048, 3)
    assert readable.all()


# Damage


@pytest.mark.parametrize("ome", [False, True])
def test_only_the_damaged_region_fails(
    picture: np.ndarray, write_tiff: WriteTiff, ruin_tiles: TileEdit, *, ome: bool
) -> None:
    """OpenSlide would fail for every read that follows; the message says where the damage is."""
    path = write_tiff(picture, compression="jpeg", ome=ome)
    ruin_tiles(path, [1])
    with Slide.open(path) as slide:
        recipe = slide.recipe(0.5)
        for _ in range(2):
            with pytest.raises(CorruptSlideError, match=r"slide\.tif is damaged near x = 300, y = 20"):
                slide.read((300, 20), (64, 64), recipe)
            assert mean_error(slide.read((10, 20), (64, 64), recipe), picture[20:84, 10:74]) < 3


def test_the_handle_is_a_new_one_after_a_failed_read(
    picture: np.ndarray, write_tiff: WriteTiff, ruin_tiles: TileEdit
) -> None:
    """Otherwise every later read would open the file once more: minutes a slide on a network drive."""
    path = write_tiff(picture, compression="jpeg")
    ruin_tiles(path, [1])
    with Slide.open(path) as slide:
        with pytest.raises(CorruptSlideError):
            slide.read((300, 20), (64, 64), slide.recipe(0.5))
        assert slide._reader.read(0, (10, 20), (64, 64)).size == (64, 64)  # noqa: SLF001 - seen only in speed else


@pytest.mark.parametrize("ome", [False, True])
def test_damage_seen_by_one_thread_does_not_spoil_the_others(
    picture: np.ndarray, write_tiff: WriteTiff, ruin_tiles: TileEdit, *, ome: bool
) -> None:
    """Eight threads, three reads in twelve damaged: exactly those fail."""
    path = write_tiff(picture, compression="jpeg", ome=ome)
    ruined = [1, 6, 11]
    ruin_tiles(path, ruined)
    with Slide.open(path) as slide, ThreadPoolExecutor(8) as threads:
        recipe = slide.recipe(0.5)

        def is_right(tile: int) -> bool:
            row, column = divmod(tile % 12, 4)
            x, y = 256 * column + 16, 256 * row + 16
            try:
                return mean_error(slide.read((x, y), (96, 96), recipe), picture[y : y + 96, x : x + 96]) < 3
            except CorruptSlideError:
                return False

        found = list(threads.map(is_right, range(120)))
    assert found == [tile % 12 not in ruined for tile in range(120)]


def test_the_overview_leaves_out_only_what_is_damaged(
    picture: np.ndarray, write_tiff: WriteTiff, ruin_tiles: TileEdit
) -> None:
    """The damaged tile and the filter's margin around it are unreadable and white; the far half is there."""
    path = write_tiff(picture, compression="jpeg")
    ruin_tiles(path, [0])
    with Slide.open(path) as slide:
        rgb, readable = slide.overview(2.0)
    assert not readable[:60, :60].any()
    assert (rgb[~readable] == 255).all()
    assert readable[:, 130:].all()
    assert readable.mean() > 0.7
    assert mean_error(rgb[:, 130:-1], block_means(picture, 4)[:, 130:-1]) < 3


def test_a_slide_of_which_nothing_can_be_read_is_corrupt(
    picture: np.ndarray, write_tiff: WriteTiff, ruin_tiles: TileEdit
) -> None:
    """Rather than a white overview without tissue."""
    path = write_tiff(picture, compression="jpeg")
    ruin_tiles(path, list(range(12)))
    with Slide.open(path) as slide, pytest.raises(CorruptSlideError, match="no part"):
        slide.overview(2.0)


def test_a_slide_cut_short_opens_with_a_warning_and_its_end_is_corrupt(
    picture: np.ndarray, write_tiff: WriteTiff
) -> None:
    """The first half of the file holds the first half of the tiles."""
    path = write_tiff(picture)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Slide.open(path) as slide:
        recipe = slide.recipe(0.5)
        assert "damaged" in slide.warnings[0]
        assert np.array_equal(slide.read((0, 0), (64, 64), recipe), picture[:64, :64])
        with pytest.raises(CorruptSlideError, match=r"slide\.tif"):
            slide.read((900, 700), (64, 64), recipe)


def test_a_slide_cut_short_before_its_mpp_is_corrupt_rather_than_without_mpp(
    picture: np.ndarray, write_tiff: WriteTiff
) -> None:
    """Copying the file again mends it; an mpp from the user would not."""
    path = write_tiff(picture, mpp=None)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CorruptSlideError, match="damaged"):
        Slide.open(path)


@pytest.mark.parametrize("length", [8, 20, 60])
def test_a_tiff_of_which_only_the_start_is_left_is_corrupt(
    picture: np.ndarray, write_tiff: WriteTiff, length: int
) -> None:
    """It begins as a TIFF and goes nowhere."""
    path = write_tiff(picture)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CorruptSlideError, match=r"^slide\.tif is damaged or cut short"):
        Slide.open(path, mpp=0.5)


def test_what_is_no_slide_is_refused(tmp_path: Path) -> None:
    """The message names the file without its folder, which may hold a patient's name."""
    path = tmp_path / "text.svs"
    path.write_text("this is no slide\n" * 100)
    with pytest.raises(SlideError, match=r"^text\.svs is not a slide that OpenSlide or TiffSlide can open"):
        Slide.open(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    """Each by its own reason."""
    with pytest.raises(SlideError, match=r"^missing\.svs does not exist"):
        Slide.open(tmp_path / "missing.svs")
    with pytest.raises(SlideError, match="is a folder"):
        Slide.open(tmp_path)


def test_an_empty_file_is_corrupt(tmp_path: Path) -> None:
    """As an interrupted copy leaves it."""
    (tmp_path / "empty.svs").touch()
    with pytest.raises(CorruptSlideError, match=r"^empty\.svs is empty"):
        Slide.open(tmp_path / "empty.svs")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused(picture: np.ndarray, write_tiff: WriteTiff) -> None:
    """The reason is named, not taken for damage."""
    path = write_tiff(picture)
    path.chmod(0)
    with pytest.raises(SlideError, match="permission"):
        Slide.open(path)


def test_a_file_that_vanishes_while_it_is_read_is_a_slide_error(
    picture: np.ndarray, write_tiff: WriteTiff, ruin_tiles: TileEdit
) -> None:
    """As when a network drive goes away: no exception of OpenSlide comes through."""
    path = write_tiff(picture, compression="jpeg")
    ruin_tiles(path, [1])
    with Slide.open(path) as slide:
        path.unlink()
        with pytest.raises(SlideError, match="cannot be opened any more"):
            slide.read((300, 20), (64, 64), slide.recipe(0.5))


# Identity


def test_the_fingerprint_follows_the_content_and_not_the_name(tmp_path: Path) -> None:
    """A copy has the same one; another start, end or length has another."""
    content = bytes(300_000)
    variants = [content, b"a" + content[1:], content[:-1] + b"a", content + b"\0", b""]
    for i, variant in enumerate(variants):
        (tmp_path / f"{i}.svs").write_bytes(variant)
    (tmp_path / "copy.svs").write_bytes(content)
    prints = [fingerprint(tmp_path / f"{i}.svs") for i in range(len(variants))]
    assert len(set(prints)) == len(variants)
    assert fingerprint(tmp_path / "copy.svs") == prints[0]
    with pytest.raises(SlideError, match="does not exist"):
        fingerprint(tmp_path / "missing.svs")


# Real slides


@pytest.mark.parametrize(
    ("name", "given_mpp", "reader", "mpp"),
    [
        ("cmu-1-small-region.svs", None, "openslide", 0.499),
        ("tcga-cr-7395-01a-01-ts1.svs", 0.5, "openslide", 0.5),
        ("kidney-48-5.tif", 0.5, "tiffslide", 0.5),
        ("fluorescence 2 (560).ndpi", None, "openslide", 0.2282),
    ],
)
def test_real_slides_are_read(shared_data: Path, name: str, given_mpp: float | None, reader: str, mpp: float) -> None:
    """Aperio JPEG and JPEG 2000, Hamamatsu, and TIFF in strips."""
    with Slide.open(shared_data / "slides" / name, mpp=given_mpp) as slide:
        assert slide.reader == reader
        assert slide.mpp == pytest.approx((mpp, mpp), rel=1e-3)
        tile = slide.read((512, 512), (256, 256), slide.recipe(0.5))
        rgb, readable = slide.overview(8.0)
    assert tile.shape == (256, 256, 3)
    assert tile.std() > 0.5
    assert readable.all()
    assert rgb.shape[0] == pytest.approx(slide.size_level0_px[1] * mpp / 8, abs=1)


def test_a_real_overview_without_its_fine_levels_is_too_coarse(shared_data: Path) -> None:
    """A DICOM file with the 29 µm/px level only."""
    with (
        Slide.open(shared_data / "slides" / "camelyon_overview.dcm") as slide,
        pytest.raises(SlideError, match=r"28\.97 µm/px.*0\.5 µm/px"),
    ):
        slide.recipe(0.5)


def test_a_real_broken_slide_is_refused(shared_data: Path) -> None:
    """One KB that is no slide."""
    with pytest.raises(SlideError, match=r"^broken\.svs is not a slide"):
        Slide.open(shared_data / "slides" / "broken.svs")
