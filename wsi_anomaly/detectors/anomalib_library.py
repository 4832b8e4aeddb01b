"""The library anomalib, driven without files, logs and network. Knows nothing of detectors and their folders."""

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from importlib import import_module
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from wsi_anomaly.devices import reproducible
from wsi_anomaly.errors import ModelError, OptionsError


def train(
    module: Any,  # noqa: ANN401 - the library's
    pixels: UInt8[np.ndarray, "tile y x rgb"],
    device: torch.device,
    *,
    epochs: int,
    batch_size: int,
    held_out: UInt8[np.ndarray, "held_out y x rgb"] | None = None,
) -> None:
    """Fit a Lightning module of the library by its own steps, with nothing written, logged or shown.

    Where the module looks at normal tiles that it has not learnt from, `held_out` are shown to it after the last epoch.
    """
    lightning, image_batch = library("lightning.pytorch"), library("anomalib.data").ImageBatch

    def collated(tiles: list[torch.Tensor]) -> Any:  # noqa: ANN401 - the library's
        images = torch.stack(tiles).permute(0, 3, 1, 2).float().contiguous() / 255
        # Some models ask for the truth too, to plant anomalies of their own beside it.
        return image_batch(
            image=images,
            gt_label=torch.zeros(len(tiles), dtype=torch.bool),
            gt_mask=torch.zeros_like(images[:, 0]).bool(),
        )

    def batches(tiles: UInt8[np.ndarray, "tile y x rgb"], *, shuffle: bool) -> Any:  # noqa: ANN401 - of anything
        # Batch statistics of a last tile that is alone would be none.
        alone = shuffle and len(tiles) % batch_size == 1 and len(tiles) > 1
        dataset: Any = torch.from_numpy(tiles)  # as good as a Dataset
        return torch.utils.data.DataLoader(
            dataset, batch_size=batch_size, shuffle=shuffle, collate_fn=collated, drop_last=alone
        )

    # Some models ask for the tiles before training starts, or how many come at once, and look for them here.
    tiles = lightning.LightningDataModule()
    tiles.train_batch_size, tiles.train_dataloader = batch_size, lambda: batches(pixels, shuffle=True)
    if held_out is not None:
        tiles.val_dataloader = lambda: batches(held_out, shuffle=False)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):  # they tell of devices and advertise
        logging.getLogger(name).setLevel(logging.ERROR)
    settings = {"max_epochs": epochs, "check_val_every_n_epoch": epochs, **module.trainer_arguments, "devices": 1}
    trainer = lightning.Trainer(
        **settings,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    bars = library("tqdm").tqdm
    with patched(bars, "__init__", partialmethod(bars.__init__, disable=True)), reproducible():
        trainer.fit(module, datamodule=tiles)


@contextmanager
def weights_of(path: str) -> Iterator[None]:
    """Inside, whoever asks timm for pretrained weights gets those of the file, or random ones: it fetches none.

    Raises:
        ModelError: there is no such file, or it holds other weights.
        OptionsError: a backbone shall come from the hub.
    """
    timm = library("timm")
    create = timm.create_model

    def create_from_file(name: str, *, pretrained: bool = False, **settings: Any) -> torch.nn.Module:  # noqa: ANN401
        if name.startswith(("hf-hub:", "hf_hub:")):
            raise OptionsError(f"the backbone '{name}' lies on the hub, and nothing is fetched. Give the name in timm.")
        if not (pretrained and path):
            return create(name, pretrained=False, **settings)
        try:
            return create(name, pretrained=True, pretrained_cfg_overlay={"file": path}, **settings)
        except (OSError, RuntimeError, KeyError) as error:
            raise ModelError(f"{path}: does not hold timm's weights of '{name}' ({error}). Give their file.") from error

    with patched(timm, "create_model", create_from_file):
        yield


def library(name: str) -> Any:  # noqa: ANN401 - a module
    """A module of anomalib or of what it needs.

    Raises:
        OptionsError: it is not installed.
    """
    try:
        with quiet():
            return import_module(name)
    except ModuleNotFoundError as error:
        raise OptionsError(
            f"the detector 'anomalib' needs the Python package '{error.name}', which is not installed. "
            "Install it: pip install 'wsi-anomaly[anomalib]'"
        ) from error


@contextmanager
def patched(owner: Any, name: str, value: object) -> Iterator[None]:  # noqa: ANN401 - a module
    """Inside, the owner has another attribute of this name."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global random states that the library draws from start at the seed; after it, they are as before."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 - the library uses it
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - the library uses it
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002 - the library uses it


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the library's warnings about itself are not shown: a user cannot mend them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
