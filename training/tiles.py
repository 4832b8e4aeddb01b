"""Draw the made-up tiles that the small models learn from, and read them again. Teaches nothing.

    python training/tiles.py --out FOLDER [--tiles 12000] [--seed 0] [--processes 2]

Tiles lie in shards of `SHARD_TILES`; a shard is a function of the seed and its number, and a finished one is kept. So a
killed command goes on when it is run again, and more tiles can be asked for later.
"""

import argparse
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from itertools import repeat
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from rich.console import Console
from rich.progress import track

from wsi_anomaly.detectors.protocol import Prompt, TileBatch
from wsi_anomaly.detectors.weights import write_whole
from wsi_anomaly.errors import CohortError
from wsi_anomaly.prompts.building import JOINER, PREFIX
from wsi_anomaly.synthetic import TileKind, keywords_of, synthetic_tiles

TILE_PX = 256
SHARD_TILES = 336
KINDS: tuple[TileKind, ...] = (
    *("normal", "metastasis", "normal", "micrometastasis", "normal", "isolated_tumour_cells"),
    *("normal", "metastasis", "normal", "necrosis", "normal", "fibrosis", "normal", "mucin"),
)
"""Normal tissue as often as disease. Artefacts are nothing that a keyword speaks of."""
MOST_KEYWORDS = 5


def main() -> None:
    """Draw what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiles", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    write_tiles(arguments.out, number=arguments.tiles, seed=arguments.seed, processes=arguments.processes)
    Console().print(f"{len(LessonTiles(arguments.out)):,} tiles lie in {arguments.out}", highlight=False)


def write_tiles(
    folder: Path,
    *,
    number: int,
    seed: int = 0,
    processes: int = 1,
    tile_px: int = TILE_PX,
    shard_tiles: int = SHARD_TILES,
) -> None:
    """Draw at least so many tiles into `folder`, whole shards of them, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = range(-(-number // shard_tiles))
    missing = [shard for shard in shards if not shard_file(folder, "tiles", shard).is_file()]
    with ProcessPoolExecutor(processes) as pool:
        drawn = pool.map(_write_shard, repeat(folder), missing, repeat(seed), repeat(tile_px), repeat(shard_tiles))
        for _ in track(drawn, f"Drawing {len(missing)} shards", total=len(missing), console=Console(stderr=True)):
            pass


class LessonTiles:
    """The tiles of a folder, as a detector's `TileSource`: each under a prompt of keywords that are true of it.

    Made-up tiles, and the real ones of `real_tiles.py`: nobody knows what these show, so their prompt names what an
    image-text model found in them, or no keyword.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CohortError where no tiles lie."""
        shards = sorted(path for kind in ("tiles", "real") for path in folder.glob(f"{kind}-*.json"))
        if not shards:
            raise CohortError(f"{folder}: there are no tiles. Draw some: python training/tiles.py --out {folder}")
        self._pixels = [np.load(path.with_suffix(".npy"), mmap_mode="r") for path in shards]
        self._ends = np.cumsum([len(pixels) for pixels in self._pixels])
        known = [tile for path in shards for tile in json.loads(path.read_text(encoding="utf-8"))]
        self.shares: Sequence[Mapping[str, float] | None] = [tile if isinstance(tile, dict) else None for tile in known]
        """Of each made-up tile, what share of it each structure takes."""
        self._found: Sequence[Sequence[str]] = [tile if isinstance(tile, list) else () for tile in known]
        """Of each real tile, the keywords that an image-text model found."""

    def __len__(self) -> int:
        """How many tiles there are."""
        return len(self.shares)

    @cached_property
    def groups(self) -> Int64[np.ndarray, " tile"]:
        """The number of the tile's shard: no slide is in two of them."""
        return np.repeat(np.arange(len(self._pixels)), np.diff(self._ends, prepend=0))

    @property
    def slides(self) -> Int64[np.ndarray, " tile"]:
        """Shards too: each has tiles of many slides."""
        return self.groups

    def read(self, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        """The tiles at these positions, in this order."""
        pixels = np.stack([self._pixel(int(index)) for index in indices])
        return TileBatch(pixels, indices.astype(np.uint64), tuple(self._prompt(int(index)) for index in indices))

    def _pixel(self, index: int) -> UInt8[np.ndarray, "y x rgb"]:
        shard = bisect_right(self._ends, index)
        return np.asarray(self._pixels[shard][index - self._ends[shard]])

    def _prompt(self, index: int) -> Prompt:
        """Some of the tile's keywords, always the same ones, put as the stage `prompt` puts them."""
        rng = np.random.default_rng(index)
        keywords = self._found[index] or keywords_of(self.shares[index] or {})
        chosen = rng.permutation(len(keywords))[: rng.integers(1, MOST_KEYWORDS + 1)]
        return ((f"{PREFIX} {f' {JOINER} '.join(keywords[i] for i in sorted(chosen))}".strip(), 1.0),)


def _write_shard(folder: Path, shard: int, seed: int, tile_px: int, shard_tiles: int) -> None:
    """The truth comes last: it says that the pixels are there."""
    tiles = list(synthetic_tiles(_shard_seed(seed, shard), shard_tiles, tile_px=tile_px, kinds=KINDS))
    pixels, truth = np.stack([tile for tile, _ in tiles]), [dict(known.shares) for _, known in tiles]
    path = shard_file(folder, "tiles", shard)
    write_whole(path.with_suffix(".npy"), lambda file: np.save(file, pixels))
    write_whole(path, lambda file: file.write(json.dumps(truth).encode()))


def _shard_seed(seed: int, shard: int) -> int:
    return int(np.random.SeedSequence((seed, shard)).generate_state(1)[0])


def shard_file(folder: Path, kind: str, shard: int) -> Path:
    """What is known of a shard's tiles; pixels lie beside it. The last to be written."""
    return folder / f"{kind}-{shard:05d}.json"


if __name__ == "__main__":
    main()
