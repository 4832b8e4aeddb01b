"""What a fit needs of each tile instead of its pixels, made once and kept on disk. Draws no noise, knows no schedule.

That is the tile's prompt, and what the VAE says of it: a normal distribution of latents. Mean and deviation do not
change while the UNet learns: with them, the latents of a step are mean + deviation * noise, exactly as if the tile had
been encoded again.
"""

import hashlib
import json
import logging
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Bool, Float, Float32, Int64, UInt8

from wsi_anomaly.detectors.protocol import Prompt
from wsi_anomaly.devices import in_fixed_chunks

Moments = Float32[np.ndarray, "tile moment latent y_latent x_latent"]
"""Mean and deviation of each tile's scaled latents, in this order."""

log = logging.getLogger(__name__)


class LatentCache:
    """Moments and prompts of the tiles of one fit, by their position in the source. Two threads may ask at once."""

    def __init__(self, file: BinaryIO | None, shape: tuple[int, int, int]) -> None:
        """`shape` is (latent, y, x). Without a file nothing is kept."""
        self._file = file
        self._row = _row(shape)
        self._lock = threading.Lock()

    def prompts(self, positions: Int64[np.ndarray, " tile"]) -> tuple[Prompt, ...] | None:
        """The prompts of the tiles at these positions, if all of them are kept: then nobody needs to read the tiles."""
        rows, known = self._rows(positions)
        return tuple(_prompt(text) for text in rows["prompt"].tolist()) if known.all() else None

    def moments(
        self,
        positions: Int64[np.ndarray, " tile"],
        prompts: Sequence[Prompt],
        encode: Callable[[np.ndarray], np.ndarray],
    ) -> Moments:
        """The moments of the tiles at these positions.

        `encode` gets the places in `positions` of the tiles that are not known yet, and gives their moments. They must
        not depend on which other tiles there are: see `posterior_moments`. They are kept with the tiles' prompts.
        """
        rows, known = self._rows(positions)
        missing = np.flatnonzero(~known)
        if len(missing):
            rows["moments"][missing] = encode(missing)
            for place in missing.tolist():
                self._keep(int(positions[place]), prompts[place], rows[place : place + 1])
        return rows["moments"].astype(np.float32)

    def _rows(self, positions: Int64[np.ndarray, " tile"]) -> tuple[np.ndarray, Bool[np.ndarray, " tile"]]:
        """What is kept of these tiles, and of which of them that is."""
        rows = np.zeros(len(positions), self._row)
        known = [self._read(position, rows[place : place + 1]) for place, position in enumerate(positions.tolist())]
        return rows, np.array(known, bool)

    def _read(self, position: int, row: np.ndarray) -> bool:
        """Fill the row; whether it is there and whole."""
        with self._lock:
            if self._file is None:
                return False
            self._file.seek(position * self._row.itemsize)
            content = self._file.read(self._row.itemsize)
        if len(content) < self._row.itemsize:
            return False
        row[:] = np.frombuffer(content, self._row)
        return bool(row["checksum"][0] == _checksum(row))

    def _keep(self, position: int, prompt: Prompt, row: np.ndarray) -> None:
        """Write the row: whatever interrupts this, a row that is not whole does not fit its checksum."""
        text = json.dumps(prompt).encode()
        if len(text) > _PROMPT_BYTES:
            return  # so the tile is read anew in each epoch
        row["prompt"] = text
        row["checksum"] = _checksum(row)
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.seek(position * self._row.itemsize)
                self._file.write(row.tobytes())
            except OSError as error:
                log.warning("latents of tiles are no longer kept, which costs time in every epoch (%s)", error)
                self._file = None


@contextmanager
def latent_cache(folder: Path, shape: tuple[int, int, int], *, tiles: int, identity: str) -> Iterator[LatentCache]:
    """The cache of a fit in `folder`, which is gone when the fit ends well, and waits for it if not.

    `shape` is (latent, y, x), `tiles` how many there are. `identity` stands for them, their prompts and the VAE: what
    was kept under another one is removed. Where there is no room, nothing is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(f"{FORMAT_VERSION}|{identity}|{shape}|{tiles}".encode()).hexdigest()[:16]
    path = folder / f"{_PREFIX}{name}"
    for other in folder.glob(f"{_PREFIX}*"):
        if other != path:
            other.unlink()
    if not path.exists() and not _has_room(folder, tiles * _row(shape).itemsize):
        yield LatentCache(None, shape)
        return
    path.touch()
    with path.open("r+b", buffering=0) as file:
        yield LatentCache(file, shape)
    path.unlink()


def posterior_moments(vae: AutoencoderKL, pixels: UInt8[np.ndarray, "tile y x rgb"], device: torch.device) -> Moments:
    """The scaled moments of each tile, in float32, whatever other tiles come with it.

    With noise of deviation 1, mean + deviation * noise is what `vae.encode(...).latent_dist.sample()` draws, times the
    VAE's scaling factor.
    """

    def of_chunk(
        chunk: UInt8[torch.Tensor, "chunk y x rgb"],
    ) -> Float[torch.Tensor, "chunk moment latent y_latent x_latent"]:
        images = chunk.permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1).float() * vae.config.scaling_factor

    return in_fixed_chunks(of_chunk, pixels, device)


def _has_room(folder: Path, needed: int) -> bool:
    free = shutil.disk_usage(folder).free
    if needed <= _MOST_OF_FREE * free:
        return True
    log.warning(
        "%s: %.1f GB are free, too little to keep the latents of the tiles (%.1f GB): every tile is encoded anew in "
        "each epoch, which costs time",
        folder,
        free / 1e9,
        needed / 1e9,
    )
    return False


def _row(shape: tuple[int, int, int]) -> np.dtype[np.void]:
    return np.dtype([("checksum", "<u4"), ("prompt", f"S{_PROMPT_BYTES}"), ("moments", "<f4", (_MOMENTS, *shape))])


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(row["moments"].tobytes(), zlib.crc32(row["prompt"].tobytes()))


def _prompt(text: bytes) -> Prompt:
    return tuple((words, float(weight)) for words, weight in json.loads(text))


FORMAT_VERSION = 2
_PREFIX = "latents-"
_MOMENTS = 2
_PROMPT_BYTES = 2048
"""Room for a prompt of the longest text that CLIP reads, with weights and brackets: a sixteenth of the moments."""
_MOST_OF_FREE = 0.9
