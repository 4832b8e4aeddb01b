from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import Bool
from PIL import Image

from wsi_anomaly.annotations import read_mask
from wsi_anomaly.errors import AnnotationError

CHECKS = np.array([[0, 1, 0], [2, 0, 255]], np.uint8)


def mask_of(path: Path, shape: tuple[int, int], size: tuple[int, int], bounds: Any = None) -> Bool[np.ndarray, "y x"]:
    """The mask within the bounds, which are the whole slide where none are given."""
    return read_mask(path, shape=shape, size_level0_px=size, bounds_level0_px=bounds or (0, 0, *size))


def picture(mode: str) -> Image.Image:
    """`CHECKS` as a picture of the mode, where pixels above 0 stand out in one channel only."""
    grey = Image.fromarray(CHECKS)
    if mode == "RGB":
        return Image.merge("RGB", [Image.new("L", grey.size), Image.new("L", grey.size), grey])
    if mode == "RGBA":
        return Image.merge("RGBA", [*[Image.new("L", grey.size, 9)] * 3, grey])
    if mode == "LA":
        return Image.merge("LA", [grey, Image.new("L", grey.size, 255)])
    if mode == "P":
        grey = grey.copy()
        grey.putpalette([255, 255, 255, 0, 0, 0] + [7] * 762)
        return grey
    if mode == "1":
        return Image.fromarray(CHECKS > 0)
    return Image.fromarray(CHECKS.astype({"L": np.uint8, "I;16": np.uint16, "F": np.float32}[mode]))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *[(mode, "png") for mode in ("L", "1", "P", "LA", "RGB", "RGBA", "I;16")],
        *[(mode, "tif") for mode in ("L", "1", "P", "RGB", "RGBA", "I;16", "F")],
    ],
)
def test_any_value_above_zero_is_tissue_in_every_kind_of_picture(tmp_path: Path, mode: str, suffix: str) -> None:
    """Grey, black and white, palette (its number, not its colour), colour, transparency, 16 bit, float."""
    drawn = picture(mode)
    assert drawn.mode == mode
    drawn.save(tmp_path / f"mask.{suffix}")
    assert mask_of(tmp_path / f"mask.{suffix}", (2, 3), (3000, 2000)).tolist() == (CHECKS > 0).tolist()


def test_a_mask_is_resampled_to_the_nearest_pixel(tmp_path: Path) -> None:
    """Up by repetition, down by the pixel at the centre."""
    picture("L").save(tmp_path / "mask.png")
    up = mask_of(tmp_path / "mask.png", (4, 6), (3000, 2000))
    assert up.tolist() == np.kron(CHECKS > 0, np.ones((2, 2), np.bool_)).astype(np.bool_).tolist()
    Image.fromarray(np.kron(CHECKS, np.ones((5, 5), np.uint8))).save(tmp_path / "large.png")
    assert mask_of(tmp_path / "large.png", (2, 3), (3000, 2000)).tolist() == (CHECKS > 0).tolist()


def test_a_mask_of_the_whole_frame_gives_what_lies_within_the_bounds(tmp_path: Path) -> None:
    """The bounds are the last two columns of the lower row."""
    picture("L").save(tmp_path / "mask.png")
    found = mask_of(tmp_path / "mask.png", (2, 4), (3000, 2000), (1000, 1000, 2000, 1000))
    assert found.tolist() == [[False, False, True, True]] * 2


def test_a_mask_of_the_proportions_of_the_bounds_shows_the_bounds(tmp_path: Path) -> None:
    """QuPath exports what it shows, which is the bounds."""
    picture("L").save(tmp_path / "mask.png")
    found = mask_of(tmp_path / "mask.png", (2, 3), (8000, 8000), (1000, 1000, 3000, 2000))
    assert found.tolist() == (CHECKS > 0).tolist()


def test_proportions_that_fit_to_a_pixel_win_over_those_that_fit_roughly(tmp_path: Path) -> None:
    """Frame (1.25) and bounds (1.23) are both within two per cent of the picture, which is the bounds."""
    mask = np.zeros((650, 800), np.uint8)
    mask[0, 0] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert mask_of(tmp_path / "mask.png", (650, 800), (10000, 8000), (1000, 1000, 8000, 6500))[0, 0]


def test_a_mask_of_other_proportions_is_refused_with_the_sizes(tmp_path: Path) -> None:
    """Stretching it would put tissue where there is none."""
    Image.new("L", (100, 110)).save(tmp_path / "mask.png")
    with pytest.raises(AnnotationError, match=r"mask\.png: 100 x 110 px; .*3000 x 2000.*500 x 500"):
        mask_of(tmp_path / "mask.png", (2, 3), (3000, 2000), (0, 0, 500, 500))


def test_a_pyramid_is_read_at_the_level_that_is_just_fine_enough(tmp_path: Path) -> None:
    """Levels of 400, 200 and 100 pixels differ in their values, so that the one that was read shows."""
    levels = [Image.new("L", (400, 400), 0), Image.new("L", (200, 200), 1), Image.new("L", (100, 100), 0)]
    levels.append(Image.new("L", (300, 120), 0))
    levels[0].save(tmp_path / "mask.tif", save_all=True, append_images=levels[1:], compression="tiff_lzw")
    assert mask_of(tmp_path / "mask.tif", (150, 150), (4000, 4000)).all()
    assert not mask_of(tmp_path / "mask.tif", (100, 100), (4000, 4000)).any()
    assert not mask_of(tmp_path / "mask.tif", (500, 500), (4000, 4000)).any()
    assert not mask_of(tmp_path / "mask.tif", (150, 150), (4000, 4000), (0, 0, 2000, 2000)).any()


def test_a_mask_may_have_more_pixels_than_pillow_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lifted for the mask and stays for everybody else."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with Image.new("L", (100, 100), 1) as drawn:
        drawn.save(tmp_path / "mask.png")
        drawn.save(tmp_path / "mask.tif")
    assert mask_of(tmp_path / "mask.png", (10, 10), (1000, 1000)).all()
    assert mask_of(tmp_path / "mask.tif", (10, 10), (1000, 1000)).all()
    assert Image.MAX_IMAGE_PIXELS == 2


@pytest.mark.parametrize("name", ["mask.jpg", "mask.tif"])
def test_a_mask_stored_as_jpeg_is_refused(tmp_path: Path, name: str) -> None:
    """Its ringing is above 0 all around the tissue."""
    options = {"compression": "jpeg"} if name.endswith("tif") else {}
    Image.new("L", (100, 100), 1).save(tmp_path / name, **options)
    with pytest.raises(AnnotationError, match=name):
        mask_of(tmp_path / name, (10, 10), (1000, 1000))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_damaged_mask_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    """Cut off in the middle, or no picture at all."""
    path = tmp_path / f"mask.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (200, 200), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(AnnotationError, match=rf"^mask\.{suffix}: "):
        mask_of(path, (10, 10), (1000, 1000))
    path.write_bytes(b"no picture")
    with pytest.raises(AnnotationError, match="no PNG or TIFF"):
        mask_of(path, (10, 10), (1000, 1000))


def test_a_mask_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    """Without the folders above it."""
    with pytest.raises(AnnotationError, match=r"^nowhere\.png: "):
        mask_of(tmp_path / "nowhere.png", (1, 1), (10, 10))
