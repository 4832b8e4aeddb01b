"""Fixtures for every test: the shared real data, small real slide files, and a small image-text model."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

# One thread a process, also in those that tests start: as many workers as cores run beside each other, and sums of
# another number of parts round otherwise. Before anything loads OpenMP.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import tifffile
from skimage.transform import downscale_local_mean

from wsi_anomaly.imaging.geometry import Grid
from wsi_anomaly.plugins import IMAGE_TEXT_MODELS, load_plugin
from wsi_anomaly.prompts.keywords import load_keywords
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import Recipe, writing
from wsi_anomaly.storage.shards import compressed
from wsi_anomaly.storage.tiles import TilePlaces, TileStatus, TileWriter
from wsi_anomaly.synthetic import write_slide
from wsi_anomaly.torchvision_shim import make_importable

make_importable()  # diffusers and transformers look for torchvision

WriteTiff = Callable[..., Path]
TILE_PX = 32


@pytest.fixture
def shared_data() -> Path:
    """The folder of real slides that lies beside a checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real slides are not here: no folder shared/data beside the checkout")
    return folder


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small made-up slides, `node` and `other`."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(("node", "other")):
        write_slide(folder / f"{name}.tif", seed=seed, size_px=(768, 768))
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


@pytest.fixture
def write_tiles(tmp_path: Path) -> Callable[..., SlideFolder]:
    """Leaves the tiles of a slide as the stage `tile` does: `write_tiles(count, slide_id="node", corrupt=())`."""

    def write(
        count: int,
        *,
        slide_id: str = "node",
        corrupt: tuple[int, ...] = (),
        seed: int = 0,
        columns: int = 40,
        tile_px: int = TILE_PX,
        results: Path | None = None,
        grey: int | None = None,
    ) -> SlideFolder:
        folder = RunFolder(results or tmp_path / "results").slide(slide_id)
        grid = Grid.over(
            (0, 0, columns * tile_px, -(-count // columns) * tile_px),
            downsample=(1.0, 1.0),
            tile_px=tile_px,
            stride_px=tile_px,
        )
        cells = grid.cells()[:count]
        places = TilePlaces(grid.origins(cells), cells, np.ones(count, np.float32))
        pixels = np.random.default_rng(seed).integers(0, 256, (count, tile_px, tile_px, 3), np.uint8)
        if grey is not None:
            pixels[:] = grey
        attributes = {
            "slide_id": slide_id,
            "tile_mpp": 0.5,
            "mpp": [0.5, 0.5],
            "stride_px": tile_px,
            "grid": asdict(grid),
        }
        with writing(folder.root, Recipe("tile", 1, {"count": count, "seed": seed})) as work:
            with TileWriter(work.folder / folder.tiles.name, places, tile_px=tile_px, attributes=attributes) as writer:
                status = [TileStatus.CORRUPT if tile in corrupt else TileStatus.OK for tile in range(count)]
                writer.append(compressed(pixels), status)
            work.facts.update({"tiles": count, "corrupt": len(corrupt)})
        return folder

    return write


@pytest.fixture(scope="session")
def small_conch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of CONCH's class that embeds a tile within a millisecond."""
    load_plugin(IMAGE_TEXT_MODELS, "conch")
    from wsi_anomaly.prompts.conch_network import ConchSizes
    from wsi_anomaly.prompts.conch_random import write_random_conch

    sizes = ConchSizes(
        embedding=16,
        image_px=32,
        patch_px=16,
        image_width=32,
        image_layers=2,
        image_heads=2,
        pooler_heads=2,
        text_width=32,
        text_layers=2,
        text_heads=2,
        vocabulary=400,
        context=32,
    )
    folder = tmp_path_factory.mktemp("conch")
    write_random_conch(folder, sizes, texts=load_keywords("lymph_node").texts(include_abnormal=True))
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion with random weights."""
    from wsi_anomaly.detectors.diffusion.random_backbone import write_random_backbone

    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_random_backbone(folder, size="tiny", texts=("tissue", "lymph node", "germinal center"))
    return folder


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the tool keeps for a user lies here, not in the folder of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
