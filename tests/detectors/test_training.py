"""Facts about the training loop, with a network of two numbers: what is held out, read, kept, resumed, left behind."""

import json
import logging
import platform
import resource
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float, Int64
from safetensors.torch import load_file

from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.detectors.training import Learner, TrainingOptions, split_tiles, train
from wsi_anomaly.devices import apply_in_chunks, resolve_device, to_pixels, to_tensor
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.testing import TilesInMemory, smooth_tiles

CPU = torch.device("cpu")


class StoppedError(Exception):
    """What stands in for a crash in these tests."""


class Watched(TilesInMemory):
    """Remembers what was asked for, and fails at a chosen read."""

    def __init__(self, count: int = 20, *, fail_at_read: int = 0) -> None:
        super().__init__(smooth_tiles(count, 4, seed=0))
        self.asked: list[list[int]] = []
        self._fail_at_read = fail_at_read

    def read(self, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        """The tiles at these positions, unless it is time to fail."""
        self.asked.append(indices.tolist())
        if len(self.asked) == self._fail_at_read:
            raise StoppedError
        return super().read(indices)


def brightness_learner(options: TrainingOptions) -> Learner:
    """Learns a brightness from tiles, disturbed by noise from the loop's generator."""
    network = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.zeros_(network.bias)

    def loss(batch: TileBatch, noise: torch.Generator) -> Float[torch.Tensor, ""]:
        brightness = torch.tensor(batch.pixels).float().mean(dim=(1, 2, 3))[:, None] / 255
        shaken = brightness + torch.randn(brightness.shape, generator=noise) / 20
        return (network(shaken) - brightness).square().mean()

    return Learner(
        network, torch.optim.Adam(network.parameters(), options.learning_rate), loss, {"detector": "brightness"}
    )


def fit(tiles: TilesInMemory, folder: Path, options: TrainingOptions) -> dict[str, bytes]:
    """Train, and return every file that is left."""
    train(brightness_learner(options), tiles, options, folder=folder, recipe=options.model_dump(mode="json"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OPTIONS = TrainingOptions(learning_rate=0.05, batch_size=4, max_epochs=4, held_out_fraction=0.2)


def test_a_finished_fit_leaves_weights_and_history_and_nothing_else(tmp_path: Path) -> None:
    """The training state is gone; the history tells losses and tiles, and why training stopped."""
    files = fit(Watched(), tmp_path / "new" / "folder", OPTIONS)
    assert set(files) == {"weights.safetensors", "history.json"}
    history = json.loads(files["history.json"])
    assert history["tiles"] == {"train": 16, "held_out": 4}
    assert history["stopped"] == "4 epochs are done"
    assert [set(epoch) for epoch in history["loss"]] == [{"train", "held_out"}] * 4


def test_each_epoch_learns_from_every_tile_once_in_another_order(tmp_path: Path) -> None:
    """Held-out tiles are never learnt from."""
    tiles = Watched()
    fit(tiles, tmp_path, OPTIONS)
    train_tiles, held_out = split_tiles(tiles.groups, 0.2, seed=0)
    steps = tiles.asked[1:]  # the first read looks at the ends
    epochs = [list(chain(*steps[start : start + 4])) for start in range(0, 20, 5)]
    assert [sorted(order) for order in epochs] == [train_tiles.tolist()] * 4
    assert len({tuple(order) for order in epochs}) == 4
    assert steps[4::5] == [held_out.tolist()] * 4


def test_no_more_tiles_than_a_batch_are_read_at_once(tmp_path: Path) -> None:
    """And batches are nearly equal, so that the last one is never a single tile among larger ones."""
    tiles = Watched(41)
    fit(tiles, tmp_path, OPTIONS.model_copy(update={"batch_size": 8}))
    sizes = {len(indices) for indices in tiles.asked[1:]}
    assert max(sizes) <= 8
    assert min(sizes) >= 6


@pytest.mark.parametrize("fail_at_read", [2, 7, 12, 20])
def test_an_interrupted_fit_goes_on_and_ends_with_the_same_files(fail_at_read: int, tmp_path: Path) -> None:
    """Wherever it stopped, also in the first epoch and while measuring."""
    with pytest.raises(StoppedError):
        fit(Watched(fail_at_read=fail_at_read), tmp_path / "stopped", OPTIONS)
    rest = Watched()
    assert fit(rest, tmp_path / "stopped", OPTIONS) == fit(Watched(), tmp_path / "whole", OPTIONS)
    assert len(rest.asked) == 1 + 20 - 5 * ((fail_at_read - 2) // 5)


def test_a_fit_with_other_options_starts_anew(tmp_path: Path) -> None:
    """What an unfinished fit with other options learnt is not used."""
    with pytest.raises(StoppedError):
        fit(Watched(fail_at_read=12), tmp_path / "stopped", OPTIONS)
    other = OPTIONS.model_copy(update={"learning_rate": 0.01})
    assert fit(Watched(), tmp_path / "stopped", other) == fit(Watched(), tmp_path / "whole", other)


def test_a_fit_on_other_tiles_starts_anew(tmp_path: Path) -> None:
    """What an unfinished fit learnt from other tiles is not used."""
    with pytest.raises(StoppedError):
        fit(Watched(fail_at_read=12), tmp_path / "stopped", OPTIONS)
    assert fit(Watched(24), tmp_path / "stopped", OPTIONS) == fit(Watched(24), tmp_path / "whole", OPTIONS)


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"\x80\x02}."])
def test_a_damaged_training_state_is_no_obstacle(content: bytes, tmp_path: Path) -> None:
    """The fit starts anew instead of failing each time."""
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "training.pt").write_bytes(content)
    assert fit(Watched(), tmp_path / "damaged", OPTIONS) == fit(Watched(), tmp_path / "whole", OPTIONS)


def test_a_finished_fit_is_not_done_again(tmp_path: Path) -> None:
    """Whoever was killed after the last epoch loses nothing; other tiles are learnt from as ever."""
    files = fit(Watched(), tmp_path, OPTIONS)
    again = Watched()
    assert fit(again, tmp_path, OPTIONS) == files
    assert again.asked == [[0, 19]]
    assert fit(Watched(24), tmp_path, OPTIONS) != files


def test_an_unfinished_fit_leaves_no_weights_of_an_earlier_one(tmp_path: Path) -> None:
    """Nobody can take old weights for new ones."""
    fit(Watched(), tmp_path, OPTIONS)
    with pytest.raises(StoppedError):
        fit(Watched(fail_at_read=12), tmp_path, OPTIONS.model_copy(update={"seed": 1}))
    assert [path.name for path in tmp_path.iterdir()] == ["training.pt"]


def test_training_stops_when_held_out_tiles_are_learnt_no_better(tmp_path: Path) -> None:
    """And the weights of the best epoch are kept, not the last ones."""
    steep = TrainingOptions(learning_rate=0.3, batch_size=4, max_epochs=60, patience=3, held_out_fraction=0.2)
    files = fit(Watched(), tmp_path / "early", steep)
    history = json.loads(files["history.json"])
    losses = [epoch["held_out"] for epoch in history["loss"]]
    assert history["stopped"] == "the loss on held-out tiles has not fallen for 3 epochs"
    assert history["best_epoch"] == 1 + losses.index(min(losses)) == len(losses) - 3
    fit(Watched(), tmp_path / "best", steep.model_copy(update={"max_epochs": history["best_epoch"]}))
    kept, best = (load_file(tmp_path / name / "weights.safetensors") for name in ("early", "best"))
    assert all(torch.equal(kept[name], best[name]) for name in best)


def test_the_log_tells_each_epoch_and_why_it_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line an epoch, one for the end."""
    with caplog.at_level(logging.INFO, "wsi_anomaly"):
        fit(Watched(), tmp_path, OPTIONS)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == [f"epoch {n} of 4" for n in (1, 2, 3, 4)] + ["stopped"]
    assert "tiles/s" in lines[0]
    assert "4 epochs are done" in lines[-1]


def test_training_leaves_the_random_state_of_its_caller_alone(tmp_path: Path) -> None:
    """Neither torch nor numpy is seeded or used up."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 - it is what must not change
    learner = brightness_learner(OPTIONS)
    torch.set_rng_state(before[0])
    train(learner, Watched(), OPTIONS, folder=tmp_path, recipe={})
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_a_loss_that_is_no_number_keeps_the_state_before_it(tmp_path: Path) -> None:
    """The epoch that failed is not written down."""
    learner = brightness_learner(OPTIONS)
    calls = []

    def loss(batch: TileBatch, noise: torch.Generator) -> Float[torch.Tensor, ""]:
        calls.append(len(batch))
        return learner.loss(batch, noise) * (float("nan") if len(calls) > 7 else 1)

    broken = Learner(learner.network, learner.optimizer, loss, {})
    with pytest.raises(ModelError, match=r"epoch 2: the loss is nan.* Lower learning_rate \(now 0.05\)"):
        train(broken, Watched(), OPTIONS, folder=tmp_path, recipe={})
    assert len(torch.load(tmp_path / "training.pt", weights_only=True)["history"]) == 1


def test_too_large_a_batch_is_an_error_that_says_what_to_lower(tmp_path: Path) -> None:
    """Running out of device memory is no bug."""

    def loss(_batch: TileBatch, _noise: torch.Generator) -> Float[torch.Tensor, ""]:
        raise torch.OutOfMemoryError

    learner = brightness_learner(OPTIONS)
    greedy = Learner(learner.network, learner.optimizer, loss, {})
    with pytest.raises(OptionsError, match=r"too little memory for 4 tiles at once.* Lower batch_size"):
        train(greedy, Watched(), OPTIONS, folder=tmp_path, recipe={})


@given(st.lists(st.integers(0, 6), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 9))
def test_every_tile_is_learnt_from_or_held_out_and_groups_stay_whole(
    groups: list[int], fraction: float, seed: int
) -> None:
    """Both sides have tiles, whatever the groups."""
    numbers = np.array(groups)
    train_tiles, held_out = split_tiles(numbers, fraction, seed=seed)
    assert sorted([*train_tiles, *held_out]) == list(range(len(groups)))
    assert len(train_tiles)
    assert len(held_out)
    if len(set(groups)) > 1:
        assert not set(numbers[train_tiles]) & set(numbers[held_out])


def test_about_the_wished_share_is_held_out() -> None:
    """A big group does not blow it up while there are small ones."""
    groups = np.repeat(np.arange(31), [500] + [10] * 30)
    for seed in range(5):
        assert len(split_tiles(groups, 0.1, seed=seed)[1]) == 80


@pytest.mark.parametrize(
    ("sizes", "held_out"), [([1000, 1000, 1000, 1000, 9], 1009), ([400, 390, 3], 393), ([9, 500], 9)]
)
def test_a_sliver_of_a_slide_is_not_all_that_is_held_out(sizes: list[int], held_out: int) -> None:
    """Where only a small one fits, another goes with it, unless that is the last one to learn from."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for seed in range(5):
        assert len(split_tiles(groups, 0.2, seed=seed)[1]) == held_out


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to give instead; "auto" takes what there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(OptionsError, match=r"finds no CUDA device here\. Give 'cpu' or 'auto'"):
        resolve_device("cuda")
    with pytest.raises(OptionsError, match="device 'tpu' is not known"):
        resolve_device("tpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again() -> None:
    """After a few times without asking the system, which would fault in each page of these 64 MB anew."""
    resolve_device("cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.zeros(2**24)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 10 * 2**26 / resource.getpagesize()


def test_pixels_survive_the_way_to_the_device_and_back() -> None:
    """All 256 values, also from an array that must not be written to."""
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    pixels.flags.writeable = False
    assert np.array_equal(to_pixels(to_tensor(pixels, CPU)).numpy(), pixels)
    assert to_pixels(torch.tensor([-0.5, 1.5, 0.5]).reshape(1, 3, 1, 1)).flatten().tolist() == [0, 255, 128]


@pytest.mark.parametrize("count", [0, 1, 8, 9, 20])
def test_a_network_always_sees_the_same_number_of_tiles(count: int) -> None:
    """Whatever the batch, and every tile gets its own value."""
    seen = []

    def brightness(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images.mean(dim=(1, 2, 3))

    pixels = smooth_tiles(20, 4, seed=0)[:count]
    values: Callable[[np.ndarray], np.ndarray] = lambda tiles: apply_in_chunks(brightness, tiles, CPU)  # noqa: E731
    assert values(pixels) == pytest.approx(pixels.mean(axis=(1, 2, 3)) / 255, rel=1e-5)
    assert set(seen) == {8}
