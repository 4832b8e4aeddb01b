"""Put real normal tissue beside the made-up tiles, so that the small models have seen both. Teaches nothing.

    python training/real_tiles.py --out FOLDER [--patches FOLDER] [--regions FOLDER] [--image-text FOLDER]

--patches: pictures of 96 x 96 px at 0.97 µm/px, such as the normal tiles of PatchCamelyon. --regions: pictures at
0.25 µm/px, such as regions of normal Camelyon17 slides. All are brought to 0.5 µm/px; what is narrower than a tile is
mirrored at its rims. What they show is not known, only that none of it is disease. --image-text: a model that
`image_text.py` taught; it says of the real tiles in FOLDER which keywords of normal tissue are nearest, as in a run.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from rich.console import Console
from tiles import SHARD_TILES, TILE_PX, LessonTiles, shard_file

from wsi_anomaly.detectors.weights import write_whole
from wsi_anomaly.errors import CohortError, WsiAnomalyError
from wsi_anomaly.execution import Resources
from wsi_anomaly.pipeline.prompting import build_prompter
from wsi_anomaly.stages.prompt import PromptOptions, describe_tiles

Tile = UInt8[np.ndarray, "y x rgb"]

PATCH_SCALE, REGION_SCALE = 2.0, 0.5
"""From 0.97 and 0.25 µm/px to about 0.5."""
REGION_STEP_PX = TILE_PX // 2


def main() -> None:
    """Write all, each in its place: doing it again changes nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patches", type=Path)
    parser.add_argument("--regions", type=Path)
    parser.add_argument("--image-text", type=Path)
    arguments = parser.parse_args()
    try:
        write_real_tiles(arguments.out, patches=arguments.patches, regions=arguments.regions)
        if arguments.image_text:
            describe_real_tiles(arguments.out, arguments.image_text)
        tiles = LessonTiles(arguments.out)
    except WsiAnomalyError as error:
        raise SystemExit(f"error: {error}") from error
    real = sum(shares is None for shares in tiles.shares)
    Console().print(f"{real:,} of the {len(tiles):,} tiles in {arguments.out} are real", highlight=False)


def write_real_tiles(out: Path, *, patches: Path | None = None, regions: Path | None = None) -> int:
    """Write the tiles of both folders as shards. How many they are.

    Raises:
        CohortError: a folder holds no pictures.
    """
    out.mkdir(parents=True, exist_ok=True)
    tiles = (*(_patches(patches) if patches else ()), *(_regions(regions) if regions else ()))
    for number, start in enumerate(range(0, len(tiles), SHARD_TILES)):
        _write_shard(shard_file(out, "real", number), np.stack(tiles[start : start + SHARD_TILES]))
    return len(tiles)


def describe_real_tiles(folder: Path, image_text: Path) -> None:
    """Keep with each real tile the keywords of normal tissue that an image-text model finds nearest.

    Raises:
        ModelError: there is no image-text model.
    """
    model = {"name": "conch", "weights": str(image_text.resolve())}
    prompter = build_prompter(PromptOptions(model=model), Resources(device="cpu", offline=True))
    for path in sorted(folder.glob("real-*.json")):
        # Of a prompt's fragments every second one is a keyword; words that join them stand between.
        prompts = describe_tiles(prompter, np.load(path.with_suffix(".npy"))).prompts
        _write_known(path, [[text for text, _ in prompt[1::2]] for prompt in prompts])


def _write_shard(path: Path, pixels: UInt8[np.ndarray, "tile y x rgb"]) -> None:
    write_whole(path.with_suffix(".npy"), lambda file: np.save(file, pixels))
    _write_known(path, [None] * len(pixels))


def _write_known(path: Path, known: Sequence[Sequence[str] | None]) -> None:
    write_whole(path, lambda file: file.write(json.dumps(known).encode()))


def _patches(folder: Path) -> Iterator[Tile]:
    for picture in _pictures(folder, "*.png"):
        tile = _scaled(picture, PATCH_SCALE)
        rims = [((TILE_PX - side_px) // 2, (TILE_PX - side_px + 1) // 2) for side_px in tile.shape[:2]]
        yield np.pad(tile, (*rims, (0, 0)), mode="reflect")


def _regions(folder: Path) -> Iterator[Tile]:
    for picture in _pictures(folder, "*.jp*g"):
        pixels = _scaled(picture, REGION_SCALE)
        for y in range(0, pixels.shape[0] - TILE_PX + 1, REGION_STEP_PX):
            for x in range(0, pixels.shape[1] - TILE_PX + 1, REGION_STEP_PX):
                yield pixels[y : y + TILE_PX, x : x + TILE_PX]


def _pictures(folder: Path, pattern: str) -> Iterator[Image.Image]:
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise CohortError(
            f"{folder}: holds no pictures {pattern}. Give the folder in which they lie themselves, not one above it."
        )
    for path in paths:
        with Image.open(path) as picture:
            yield picture.convert("RGB")


def _scaled(picture: Image.Image, factor: float) -> Tile:
    size = (round(factor * picture.width), round(factor * picture.height))
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.BOX))


if __name__ == "__main__":
    main()
