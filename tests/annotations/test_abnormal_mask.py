from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
from jaxtyping import Float64, UInt8
from PIL import Image

from wsi_anomaly.annotations import AbnormalMask, Frame, abnormal_fraction, read_annotation
from wsi_anomaly.annotations import abnormal_mask as abnormal_mask_module
from wsi_anomaly.annotations import pictures as pictures_module
from wsi_anomaly.annotations.abnormal_mask import _bands
from wsi_anomaly.annotations.frame import whole_downsample
from wsi_anomaly.errors import AnnotationError

FRAME = Frame((640, 480), (0, 0, 640, 480))
TILES = np.array([[x, y, x + 64, y + 64] for y in range(0, 480, 64) for x in range(0, 640, 64)], np.float64)


def blob(width: int, height: int) -> UInt8[np.ndarray, "row column"]:
    """A wavy area, 1 inside."""
    y, x = np.mgrid[0:height, 0:width] / [[[height]], [[width]]]
    return (np.hypot(x - 0.45, y - 0.5) < 0.3 + 0.05 * np.sin(9 * x + 5 * y)).astype(np.uint8)


def read(path: Path, frame: Frame = FRAME, values: list[int] | None = None) -> AbnormalMask:
    """The mask in a file."""
    mask = read_annotation(path, frame=frame, abnormal_values=values)
    assert isinstance(mask, AbnormalMask)
    return mask


def fractions_of(path: Path, values: list[int] | None = None) -> Float64[np.ndarray, " tile"]:
    """Of `TILES`."""
    return abnormal_fraction(read(path, values=values), TILES)


def counted(mask: UInt8[np.ndarray, "480 640"]) -> Float64[np.ndarray, " tile"]:
    """The share of pixels above 0 in each of `TILES`, counted one tile after the other; there are none outside."""
    padded = np.pad(mask > 0, ((0, 32), (0, 0)))
    return np.array([padded[int(y0) : int(y1), int(x0) : int(x1)].mean() for x0, y0, x1, y1 in TILES])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.tif", {}),
        ("a.tif", {"tile": (64, 96)}),
        ("a.tif", {"tile": (64, 96), "compression": "deflate", "predictor": True}),
        ("a.tif", {"rowsperstrip": 7, "compression": "lzw"}),
        ("a.tiff", {"photometric": "miniswhite"}),
    ],
)
def test_the_share_of_tiles_is_that_of_their_pixels(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Whatever the kind of file, against counted pixels."""
    mask = blob(640, 480)
    if name == "a.png":
        Image.fromarray(mask).save(tmp_path / name)
    else:
        stored = 255 - 255 * mask if options.get("photometric") == "miniswhite" else mask
        tifffile.imwrite(tmp_path / name, stored, **options)
    assert fractions_of(tmp_path / name) == pytest.approx(counted(mask), abs=1e-12)


@pytest.mark.parametrize("shrink", [2, 4, 10])
def test_a_mask_of_any_size_is_read_in_the_frame_of_the_slide(tmp_path: Path, shrink: int) -> None:
    """Its pixels are squares of the slide, also where a tile cuts them."""
    small = blob(640 // shrink, 480 // shrink)
    Image.fromarray(small).save(tmp_path / "a.png")
    assert fractions_of(tmp_path / "a.png") == pytest.approx(counted(np.kron(small, np.ones((shrink,) * 2, np.uint8))))


def test_a_mask_of_the_bounds_lies_at_the_bounds(tmp_path: Path) -> None:
    """What lies outside them is not abnormal; the report says what was assumed."""
    Image.fromarray(np.ones((20, 10), np.uint8)).save(tmp_path / "a.png")
    mask = read(tmp_path / "a.png", Frame((640, 480), (100, 200, 100, 200)))
    tiles = np.array([[90, 200, 110, 220], [0, 0, 100, 200], [150, 300, 160, 310]])
    assert abnormal_fraction(mask, tiles).tolist() == [0.5, 0, 1]
    assert mask.report == ("a.png: has the proportions of the slide's bounds and is taken to show them",)


def write_pyramid(path: Path, levels: list[UInt8[np.ndarray, "row column"]], tile: int, **options: Any) -> None:
    """Tiled levels, each shape filled up with 0 to whole tiles as ASAP does."""
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            filled = np.pad(level, [(0, -size % tile) for size in level.shape]) if number else level
            file.write(filled, tile=(tile, tile), subfiletype=int(number > 0), compression="zlib", **options)


def test_a_pyramid_is_read_at_the_coarsest_level_with_16_pixels_a_tile(tmp_path: Path) -> None:
    """Levels are 1, 0 and 1 throughout, so that the one that was read shows; the last page is a label."""
    shapes = [(480, 640), (240, 320), (120, 160)]
    levels = [np.full(shape, number % 2 == 0, np.uint8) for number, shape in enumerate(shapes)]
    write_pyramid(tmp_path / "a.tif", [*levels, np.ones((48, 16), np.uint8)], 16)
    mask = read(tmp_path / "a.tif")
    assert mask.downsamples == ((1, 1), (2, 2), (4, 4), None)
    origin = np.zeros(2)
    shares = [abnormal_fraction(mask, np.concatenate([origin, origin + side])[None])[0] for side in (8, 31, 32, 63, 64)]
    assert shares == [1, 1, 0, 0, 1]


def test_levels_filled_up_to_whole_tiles_are_not_stretched(tmp_path: Path) -> None:
    """A slide of 620 x 500 has levels of 320 x 256 and 192 x 128, of which tiles of 64 fill the last columns."""
    full = np.kron(blob(155, 125), np.ones((4, 4), np.uint8))
    write_pyramid(tmp_path / "a.tif", [full, full[::2, ::2], full[::4, ::4]], 64)
    mask = read(tmp_path / "a.tif", Frame((620, 500), (0, 0, 620, 500)))
    assert mask.downsamples == ((1, 1), (2, 2), (4, 4))
    tiles = np.array([[x, y, x + 100, y + 100] for y in range(0, 500, 100) for x in range(0, 600, 100)])
    expected = [(full[y0:y1, x0:x1]).mean() for x0, y0, x1, y1 in tiles]
    assert abnormal_fraction(mask, tiles) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("size", "of", "tile", "whole"),
    [
        ((30720, 27136), (61440, 53760), (512, 512), 2),
        ((2048, 2048), (61440, 53760), (512, 512), 32),
        ((512, 512), (61440, 53760), (512, 512), 128),
        ((1024, 1024), (61440, 53760), (0, 0), None),
        ((33, 67), (100, 200), (0, 0), 3),
        ((34, 66), (100, 200), (0, 0), 3),
        ((100, 110), (300, 200), (0, 0), None),
    ],
)
def test_a_level_is_shrunk_by_a_whole_number(
    size: tuple[int, int], of: tuple[int, int], tile: tuple[int, int], whole: int | None
) -> None:
    """The sizes of a Camelyon16 slide; sizes rounded up and down; proportions that fit nothing."""
    assert whole_downsample(size, of, tile_px=tile) == whole


def test_levels_in_subifds_are_found(tmp_path: Path) -> None:
    """As in OME-TIFF."""
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=True) as file:
        file.write(np.zeros((480, 640), np.uint8), tile=(64, 64), subifds=1)
        file.write(np.ones((240, 320), np.uint8), tile=(64, 64), subfiletype=1)
    assert read(tmp_path / "a.tif").downsamples == ((1, 1), (2, 2))
    assert (fractions_of(tmp_path / "a.tif")[:60] == 1).all()


def test_tiles_that_the_file_leaves_out_are_not_abnormal(tmp_path: Path) -> None:
    """Masks of Camelyon have only the tiles where something is."""
    mask = np.zeros((480, 640), np.uint8)
    mask[100:120, 200:230] = 1
    tifffile.imwrite(tmp_path / "a.tif", mask, tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        page = file.pages.first
        for tag in ("TileOffsets", "TileByteCounts"):
            values = page.tags[tag].value
            kept = [value if number in (13, 11 + 2) else 0 for number, value in enumerate(values)]
            page.tags[tag].overwrite(kept)
    assert fractions_of(tmp_path / "a.tif").nonzero()[0].tolist() == counted(mask).nonzero()[0].tolist()


def test_bands_cover_the_boxes_and_hold_few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order of the boxes, where one alone is larger than a band, and where a row of them is."""
    monkeypatch.setattr("wsi_anomaly.annotations.abnormal_mask._BAND_PX", 64 * 64 * 5)
    boxes = np.random.default_rng(0).permutation(np.vstack([TILES, [[0.5, 10.5, 600.2, 300]]]))
    bands = list(_bands(boxes, (640, 480)))
    assert sorted(np.concatenate([band for band, _ in bands]).tolist()) == list(range(len(boxes)))
    for band, (x0, y0, x1, y1) in bands:
        assert (np.clip(boxes[band], 0, [640, 480] * 2) >= [x0, y0, x0, y0]).all()
        assert (np.clip(boxes[band], 0, [640, 480] * 2) <= [x1, y1, x1, y1]).all()
        assert len(band) == 1 or (x1 - x0) * (y1 - y0) <= 64 * 64 * 5
    assert len(bands) == 7 * 2 + 1 + 1  # the last row is half as high


def test_shares_do_not_depend_on_the_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One band or many."""
    tifffile.imwrite(tmp_path / "a.tif", blob(640, 480), tile=(32, 32))
    whole = fractions_of(tmp_path / "a.tif")
    monkeypatch.setattr("wsi_anomaly.annotations.abnormal_mask._BAND_PX", 640 * 70)
    assert fractions_of(tmp_path / "a.tif").tolist() == whole.tolist()


def test_a_flat_mask_as_large_as_a_slide_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No region that is asked for is larger than a band, though the file is 100,000 pixels wide."""
    tile = np.ones((512, 512), np.uint8)
    across, down = 196, 4
    tiles = (tile if i in (0, across + 1) else None for i in range(across * down))
    tifffile.imwrite(
        tmp_path / "a.tif",
        tiles,
        shape=(512 * down, 512 * across),
        dtype=np.uint8,
        tile=(512, 512),
        compression="zlib",
        photometric="minisblack",
    )
    frame = Frame((512 * across, 512 * down), (0, 0, 512 * across, 512 * down))
    monkeypatch.setattr("wsi_anomaly.annotations.abnormal_mask._BAND_PX", 512 * 512 * 50)
    seen: list[int] = []
    read_pieces = pictures_module._read_pieces  # noqa: SLF001 - the one place that allocates what is read

    def counting(page: Any, piece_px: tuple[int, int], box: tuple[int, int, int, int]) -> Any:
        seen.append((box[2] - box[0]) * (box[3] - box[1]))
        return read_pieces(page, piece_px, box)

    monkeypatch.setattr(pictures_module, "_read_pieces", counting)
    boxes = np.array([[x, y, x + 512, y + 512] for y in range(0, 2048, 512) for x in range(0, 100_352, 512)])
    shares = abnormal_fraction(read(tmp_path / "a.tif", frame), boxes)
    assert shares.nonzero()[0].tolist() == [0, across + 1]
    assert sum(seen) == 512 * 512 * down * across
    assert max(seen) <= 512 * 512 * 50


def test_a_picture_that_can_be_read_only_whole_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to do."""
    monkeypatch.setattr(pictures_module, "_MAX_WHOLE_PX", 100 * 100)
    for name in ("a.png", "b.tif"):
        Image.fromarray(blob(640, 480)).save(tmp_path / name)
        with pytest.raises(AnnotationError, match=rf"^{name}: 640 x 480 px .*tiled TIFF"):
            read(tmp_path / name)
    tifffile.imwrite(tmp_path / "c.tif", blob(640, 480), tile=(64, 64))
    assert fractions_of(tmp_path / "c.tif").any()


# What the numbers mean


@pytest.mark.parametrize("value", [1, 2, 255])
def test_the_one_number_besides_0_is_abnormal(tmp_path: Path, value: int) -> None:
    """Whatever it is; nothing at all is no fault."""
    Image.fromarray(blob(640, 480) * np.uint8(value)).save(tmp_path / "a.png")
    assert fractions_of(tmp_path / "a.png") == pytest.approx(counted(blob(640, 480)))
    Image.fromarray(np.zeros((480, 640), np.uint8)).save(tmp_path / "empty.png")
    assert not fractions_of(tmp_path / "empty.png").any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_of_several_numbers_the_user_says_which_are_abnormal(tmp_path: Path, dtype: type) -> None:
    """In masks of Camelyon 1 is tumour or normal tissue, as the tool had it that made them."""
    numbers = np.ones((480, 640), dtype)
    numbers[:64, :64] = 2
    tifffile.imwrite(tmp_path / "a.tif", numbers, tile=(64, 64))
    with pytest.raises(AnnotationError, match=r"^a\.tif: holds the numbers 1, 2 besides 0; say which"):
        fractions_of(tmp_path / "a.tif")
    assert fractions_of(tmp_path / "a.tif", [2]).nonzero()[0].tolist() == [0]
    assert fractions_of(tmp_path / "a.tif", [1, 2]).sum() == 75
    assert not fractions_of(tmp_path / "a.tif", [7]).any()


def test_several_numbers_are_found_also_in_different_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part alone has one number besides 0."""
    numbers = np.repeat(np.arange(6, dtype=np.uint8), 80)[:, None] * np.ones((1, 640), np.uint8)
    Image.fromarray(numbers).save(tmp_path / "a.png")
    monkeypatch.setattr("wsi_anomaly.annotations.abnormal_mask._BAND_PX", 1)
    with pytest.raises(AnnotationError, match="holds the numbers 1, 2, 3, 4, 5 besides 0"):
        fractions_of(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGB", "RGBA", "I;16"])
def test_every_kind_of_picture_is_read(tmp_path: Path, mode: str) -> None:
    """Black and white, palette (its number), colours, transparency, 16 bit."""
    mask = blob(640, 480)
    grey = Image.fromarray(mask * np.uint8(200))
    drawn = {
        "1": lambda: Image.fromarray(mask > 0),
        "P": lambda: _with_palette(Image.fromarray(mask)),
        "LA": lambda: Image.merge("LA", [Image.new("L", grey.size, 9), grey]),
        "RGB": lambda: Image.merge("RGB", [Image.new("L", grey.size), Image.new("L", grey.size), grey]),
        "RGBA": lambda: Image.merge("RGBA", [*[Image.new("L", grey.size, 9)] * 3, grey]),
        "I;16": lambda: Image.fromarray(mask.astype(np.uint16) * 999),
    }[mode]()
    assert drawn.mode == mode
    drawn.save(tmp_path / "a.png")
    assert fractions_of(tmp_path / "a.png") == pytest.approx(counted(mask))


def _with_palette(picture: Image.Image) -> Image.Image:
    picture = picture.convert("P")
    picture.putpalette([255, 255, 255, 0, 0, 0] + [7] * 762)
    return picture


def test_colours_are_told_apart_as_numbers(tmp_path: Path) -> None:
    """A red and a blue area are two numbers."""
    rgb = np.zeros((480, 640, 3), np.uint8)
    rgb[:64, :64, 0] = 200
    rgb[64:128, :64, 2] = 200
    for name, planar in (("a.tif", "contig"), ("b.tif", "separate")):
        stored = rgb if planar == "contig" else rgb.transpose(2, 0, 1).copy()
        tifffile.imwrite(tmp_path / name, stored, photometric="rgb", planarconfig=planar, tile=(64, 64))
        with pytest.raises(AnnotationError, match="200, 13107200 besides 0"):
            fractions_of(tmp_path / name)
        assert fractions_of(tmp_path / name, [0xC80000]).nonzero()[0].tolist() == [0]


@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "rgb.jpg", "rgb.tif"])
def test_of_a_jpeg_what_is_above_127_is_abnormal(tmp_path: Path, name: str) -> None:
    """Its edges ring, so the share is right to a pixel or two along them; to name numbers makes no sense."""
    mask = blob(640, 480)
    mode = "RGB" if name.startswith("rgb") else "L"
    drawn = Image.fromarray(mask * np.uint8(255)).convert(mode)
    drawn.save(tmp_path / name, **({"compression": "jpeg"} if name.endswith("tif") else {"quality": 60}))
    assert fractions_of(tmp_path / name) == pytest.approx(counted(mask), abs=0.02)
    assert read(tmp_path / name).report == (f"{name}: stored as JPEG; what is above 127 counts as abnormal",)
    with pytest.raises(AnnotationError, match=rf"^{name}: JPEG blurs"):
        read(tmp_path / name, values=[1])


# Bad input


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg"])
def test_a_damaged_picture_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Cut off in the middle, no picture at all, and not there."""
    path = tmp_path / name
    with pytest.raises(AnnotationError, match=rf"^{name}: "):
        read(path)
    noise = np.random.default_rng(0).integers(0, 255, (480, 640), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(AnnotationError, match=rf"^{name}: "):
        fractions_of(path)
    path.write_bytes(b"no picture")
    with pytest.raises(AnnotationError, match=rf"^{name}: "):
        read(path)


def test_a_tiff_without_pages_is_refused_by_name(tmp_path: Path) -> None:
    """As a writer leaves it that was stopped."""
    (tmp_path / "a.tif").write_bytes(b"II*\0" + bytes(4))
    with pytest.raises(AnnotationError, match=r"^a\.tif: a TIFF without a picture"):
        read(tmp_path / "a.tif")


def test_a_mask_of_other_proportions_is_refused_with_the_sizes(tmp_path: Path) -> None:
    """It belongs to another slide."""
    Image.new("L", (300, 300)).save(tmp_path / "a.png")
    with pytest.raises(AnnotationError, match=r"^a\.png: 300 x 300 px; neither the slide \(640 x 480\)"):
        read(tmp_path / "a.png")


def test_boxes_beyond_the_mask_and_no_boxes_are_no_fault(tmp_path: Path) -> None:
    """The last tiles of a grid overhang the slide; a slide may have no tiles."""
    Image.fromarray(np.ones((480, 640), np.uint8)).save(tmp_path / "a.png")
    mask = read(tmp_path / "a.png")
    boxes = np.array([[600, 400, 680, 480], [-40, 0, 40, 80], [2000, 0, 2080, 80], [-90, -90, -10, -10]])
    assert abnormal_fraction(mask, boxes).tolist() == [0.5, 0.5, 0, 0]
    assert abnormal_fraction(mask, boxes[2:]).tolist() == [0, 0]
    assert abnormal_fraction(mask, np.empty((0, 4))).shape == (0,)


def test_outlines_of_a_mask_enclose_its_pixels(tmp_path: Path) -> None:
    """Holes, a second part, and pixels that touch at a corner; on a slide four times as wide and high."""
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 1:4] = 1
    mask[2, 2] = 0
    mask[4, 4] = mask[5, 7] = 1
    Image.fromarray(mask).save(tmp_path / "a.png")
    outlines = read(tmp_path / "a.png", Frame((32, 24), (0, 0, 32, 24))).outlines(4.0)
    drawn = shapely.union_all([outline.polygon for outline in outlines])
    y, x = np.mgrid[:6, :8] * 4 + 2
    assert (shapely.contains_xy(drawn, x, y) == mask).all()
    assert drawn.area == mask.sum() * 16
    assert all(outline.polygon.is_valid for outline in outlines)


@pytest.mark.parametrize("rows", [1, 7, 512])
def test_outlines_of_a_large_mask_are_of_larger_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Of which any part is abnormal, however many rows are read at once; the last ones end with the picture."""
    monkeypatch.setattr(abnormal_mask_module, "_BAND_ROWS", rows)
    mask = np.zeros((50, 62), np.uint8)
    mask[4, 9] = mask[47:, 61] = mask[20:30, 20:31] = 1
    tifffile.imwrite(tmp_path / "a.tif", mask, tile=(16, 16))
    outlines = read(tmp_path / "a.tif", Frame((62, 50), (0, 0, 62, 50))).outlines(4.5)
    boxes = {outline.polygon.bounds for outline in outlines}
    assert boxes == {(8, 4, 12, 8), (60, 44, 62, 50), (20, 20, 32, 32)}


def test_outlines_are_read_from_the_level_of_their_pixels(tmp_path: Path) -> None:
    """The coarsest that is fine enough; where all are too coarse, the finest. Here the levels do not agree."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for level, column in ((64, 0), (32, 1), (16, 2)):
            mask = np.zeros((level, level), np.uint8)
            mask[: level // 16, column * level // 16 : (column + 1) * level // 16] = 1
            file.write(mask, subfiletype=int(level < 64), tile=(16, 16))
    mask = read(tmp_path / "a.tif", Frame((128, 128), (0, 0, 128, 128)))
    for pixel, left in ((1.0, 0), (2.0, 0), (3.9, 0), (4.0, 8), (8.0, 16), (15.9, 16)):
        assert mask.outlines(pixel)[0].polygon.bounds[0] == left


def test_a_mask_of_nothing_has_no_outlines(tmp_path: Path) -> None:
    """And one of several numbers is refused as for the share of tiles."""
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(tmp_path / "none.png")
    assert read(tmp_path / "none.png").outlines(8.0) == ()
    Image.fromarray(np.tile(np.arange(4, dtype=np.uint8), (48, 16))).save(tmp_path / "many.png")
    with pytest.raises(AnnotationError, match="numbers 1, 2, 3 besides 0"):
        read(tmp_path / "many.png").outlines(8.0)
