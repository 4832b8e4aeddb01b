"""Fixtures for every test: the shared real data, and small real slide files made from a known picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from skimage.transform import downscale_local_mean

WriteTiff = Callable[..., Path]


@pytest.fixture
def shared_data() -> Path:
    """The folder of real slides that lies beside a checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real slides are not here: no folder shared/data beside the checkout")
    return folder


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """768 x 1024 RGB pixels of slow waves, different along x and y and in each channel."""
    y, x = np.mgrid[0:768, 0:1024].astype(np.float64)
    waves = [np.sin(x / 23), np.sin(y / 31), np.sin((x + 2 * y) / 47)]
    return np.rint(128 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


@pytest.fixture
def write_tiff(tmp_path: Path) -> WriteTiff:
    """Writes a plain TIFF, `write_tiff(pixels, name="slide.tif", mpp=0.5, downsamples=(1,), ome=False, **options)`.

    Levels are means of whole blocks. They follow each other as OpenSlide wants them; with `ome` they lie in SubIFDs and
    `mpp` in the OME-XML. `options` are those of tifffile, such as `compression` or `tile=None` for strips.
    """

    def write(
        pixels: np.ndarray,
        *,
        name: str = "slide.tif",
        mpp: float | None = 0.5,
        downsamples: tuple[int, ...] = (1,),
        ome: bool = False,
        **options: Any,
    ) -> Path:
        path = tmp_path / name
        height, width = pixels.shape[:2]
        settings = {"tile": (256, 256), "photometric": "rgb", "metadata": None} | options
        if ome:
            settings["metadata"] = {"axes": "YXS"} | ({"PhysicalSizeX": mpp, "PhysicalSizeY": mpp} if mpp else {})
        elif mpp:
            settings |= {"resolution": (10_000 / mpp, 10_000 / mpp), "resolutionunit": "CENTIMETER"}
        with tifffile.TiffWriter(path, ome=ome) as file:
            file.write(pixels, **settings, **({"subifds": len(downsamples) - 1} if ome else {}))
            for downsample in downsamples[1:]:
                whole = pixels[: height // downsample * downsample, : width // downsample * downsample]
                means = downscale_local_mean(whole, (downsample, downsample, 1))
                file.write(np.rint(means).astype(np.uint8), subfiletype=1, **settings)
        return path

    return write


@pytest.fixture
def ruin_tiles() -> Callable[..., None]:
    """Overwrites the data of tiles of level 0 with zeros: `ruin_tiles(path, [1])`."""

    def ruin(path: Path, tiles: list[int]) -> None:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            places = [(page.dataoffsets[tile], page.databytecounts[tile]) for tile in tiles]
        with path.open("r+b") as file:
            for offset, length in places:
                file.seek(offset)
                file.write(bytes(length))

    return ruin


@pytest.fixture
def drop_tiles() -> Callable[..., None]:
    """Makes a TIFF sparse: the file no longer has these tiles of level 0, as scanners do where there is no tissue."""

    def drop(path: Path, tiles: list[int]) -> None:
        with tifffile.TiffFile(path, mode="r+b") as file:
            page = file.pages.first
            for tag in ("TileOffsets", "TileByteCounts"):
                values = [0 if i in tiles else value for i, value in enumerate(page.tags[tag].value)]
                page.tags[tag].overwrite(values)

    return drop
