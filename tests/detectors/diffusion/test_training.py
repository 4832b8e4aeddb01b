"""Facts about the training loop, with a small network: what is learnt, drawn, resumed, shown, left behind."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from safetensors.torch import load_file

from wsi_anomaly.detectors.diffusion.learner import (
    DiffusionLearner,
    DiffusionTrainingOptions,
    Draws,
    TileOrder,
    draws,
)
from wsi_anomaly.detectors.diffusion.lora import LORA_WEIGHTS, LoraOptions, add_lora, save_lora
from wsi_anomaly.detectors.diffusion.noise import tile_noise
from wsi_anomaly.detectors.diffusion.random_backbone import random_backbone
from wsi_anomaly.detectors.diffusion.schedule import NoiseSchedule
from wsi_anomaly.detectors.diffusion.training import train_steps
from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.detectors.weights import WEIGHTS, save_weights
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.testing import TilesInMemory, smooth_tiles

TILE_PX = 4
SCHEDULE = NoiseSchedule.from_betas("linear", 0.001, 0.2, steps=50)
OPTIONS = DiffusionTrainingOptions(
    steps=12, batch_size=8, learning_rate=0.01, save_every=5, picture_every=1000, ema_decay=0.9
)
PLAIN = OPTIONS.model_copy(update={"ema_decay": None})
LEFT = {WEIGHTS, "history.json", "loss.png", "samples.png"}


class StoppedError(Exception):
    """What stands in for a crash in these tests."""


class Watched(TilesInMemory):
    """Remembers what was asked for, and fails at a chosen read."""

    def __init__(self, count: int = 20, *, fail_at_read: int = 0, die_at_read: int | None = None) -> None:
        super().__init__(smooth_tiles(count, TILE_PX, seed=0), die_at_read=die_at_read)
        self.asked: list[list[int]] = []
        self._fail_at_read = fail_at_read

    def read(self, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        """The tiles at these positions, unless it is time to fail."""
        self.asked.append(indices.tolist())
        if len(self.asked) == self._fail_at_read:
            raise StoppedError
        return super().read(indices)


class Small(torch.nn.Module):
    """Predicts noise through a frozen layer and a learnt one; more than `room` tiles at once are too many for it."""

    def __init__(self, room: int = 1000) -> None:
        super().__init__()
        generator, size = torch.Generator().manual_seed(3), 3 * TILE_PX**2
        with torch.random.fork_rng():
            self.frozen, self.learnt = torch.nn.Linear(size, size), torch.nn.Linear(size, size)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1, generator=generator)
        self.frozen.requires_grad_(requires_grad=False)
        self.room = room

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The noise in the images."""
        if len(images) > self.room:
            raise torch.OutOfMemoryError
        return self.learnt(images + self.frozen(images))


@dataclass
class Toy:
    """A learner of the network above, and what it was asked."""

    network: Small = field(default_factory=Small)
    factor: Callable[[int], float] = lambda _: 1.0
    """By how much the losses of the n-th call are multiplied."""
    positions: list[list[int]] = field(default_factory=list)
    drawn: list[Draws] = field(default_factory=list)
    before: list[torch.Tensor] = field(default_factory=list)
    """The learnt weights when a loss was asked for."""

    def learner(self) -> DiffusionLearner:
        """What the loop gets."""
        return DiffusionLearner(self.network, len(SCHEDULE), self.loss, self.rebuild, self.save, WEIGHTS, {"toy": 1})

    def loss(
        self, batch: TileBatch, positions: Int64[np.ndarray, " tile"], drawn: Draws
    ) -> Float[torch.Tensor, " tile"]:
        """How far the network is from the noise, for each tile."""
        self.before.append(self.network.learnt.weight.detach().clone())
        clean = torch.tensor(batch.pixels).reshape(len(batch), -1) / 127.5 - 1
        noise = torch.from_numpy(tile_noise(drawn.seeds, clean.shape[1:]))
        predicted = self.network(SCHEDULE.noised(clean, noise, torch.from_numpy(drawn.timesteps)))
        losses = (predicted - noise).square().mean(dim=1) * self.factor(len(self.before))
        self.positions.append(positions.tolist())
        self.drawn.append(drawn)
        return losses

    def rebuild(self, batch: TileBatch) -> UInt8[np.ndarray, "tile y x rgb"]:
        """The tiles, with one pixel that tells the first weight."""
        rebuilt = 255 - batch.pixels
        rebuilt[:, 0, 0] = 128 + 100 * self.network.learnt.weight[0, :3].clamp(-1, 1).numpy()
        return rebuilt

    def save(self, folder: Path) -> None:
        """As the other detectors do."""
        save_weights(self.network, folder, {"detector": "toy"})


def fit(
    folder: Path,
    options: DiffusionTrainingOptions = OPTIONS,
    *,
    tiles: TilesInMemory | None = None,
    toy: Toy | None = None,
) -> dict[str, bytes]:
    """Train, and return every file that is left."""
    tiles = Watched() if tiles is None else tiles
    train_steps((toy or Toy()).learner(), tiles, options, folder=folder, device="cpu")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a fit that nobody disturbed."""
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """What has learnt undisturbed, without averaging."""
    toy = Toy()
    fit(tmp_path_factory.mktemp("plain"), PLAIN, toy=toy)
    return toy


def weights(folder: Path) -> torch.Tensor:
    """What a fit learnt."""
    return load_file(folder / WEIGHTS)["learnt.weight"]


def pixels(path: Path) -> np.ndarray:
    """Those of a picture."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package logged."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("wsi_anomaly")]


def test_a_finished_fit_leaves_weights_history_and_pictures_and_nothing_else(tmp_path: Path) -> None:
    """The training state is gone; the history tells tiles, steps and losses."""
    files = fit(tmp_path / "new" / "folder")
    assert set(files) == LEFT
    history = json.loads(files["history.json"])
    assert (history["tiles"], history["steps"]) == (20, 12)
    assert [window["up_to_step"] for window in history["loss"]] == list(range(1, 13))


def test_the_loss_falls(tmp_path: Path) -> None:
    """A network that begins with nearly nothing learns to see the noise."""
    fit(tmp_path, PLAIN.model_copy(update={"steps": 300}))
    losses = [window["mean"] for window in json.loads((tmp_path / "history.json").read_bytes())["loss"]]
    assert np.mean(losses[-30:]) < np.mean(losses[:3]) / 3


def test_only_what_requires_gradients_is_learnt(tmp_path: Path) -> None:
    """And only that is in the state of an unfinished fit."""
    with pytest.raises(StoppedError):
        fit(tmp_path, tiles=Watched(fail_at_read=12))
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert set(state["stepper"]["parameters"]) == {"learnt.weight", "learnt.bias"}
    fit(tmp_path)
    learnt, fresh = load_file(tmp_path / WEIGHTS), Small().state_dict()
    assert {name for name in fresh if not torch.equal(learnt[name], fresh[name])} == {"learnt.weight", "learnt.bias"}


def test_the_learning_rate_falls_to_nothing_also_after_an_interruption(tmp_path: Path) -> None:
    """The last step moves the weights less than a twentieth of the first; a resumed fit ends with equal bytes."""
    falling = PLAIN.model_copy(update={"learning_rate_decay": "cosine"})
    toy = Toy()
    undisturbed = fit(tmp_path / "whole", falling, toy=toy)
    known = [*toy.before, toy.network.learnt.weight.detach()]
    moves = [float((after - before).norm()) for before, after in pairwise(known)]
    assert moves[-1] < moves[0] / 20
    with pytest.raises(StoppedError):
        fit(tmp_path / "stopped", falling, tiles=Watched(fail_at_read=12))
    assert fit(tmp_path / "stopped", falling) == undisturbed


@pytest.mark.parametrize("fail_at_read", [1, 2, 3, 8, 9, 13, 14])
def test_an_interrupted_fit_goes_on_and_ends_with_the_same_files(
    fail_at_read: int, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Wherever it stopped; nothing that was saved is done again."""
    with pytest.raises(StoppedError):
        fit(tmp_path, tiles=Watched(fail_at_read=fail_at_read))
    rest = Toy()
    assert fit(tmp_path, toy=rest) == whole
    steps_done = max(fail_at_read - 3, 0)  # the first reads look at the ends, and at the tiles of the pictures
    assert len(rest.before) == 12 - steps_done // 5 * 5


def test_a_killed_fit_goes_on_and_ends_with_the_same_files(whole: dict[str, bytes], tmp_path: Path) -> None:
    """SIGKILL leaves no time to tidy up."""
    script = (
        "import runpy, sys; from wsi_anomaly.torchvision_shim import make_importable; make_importable(); "
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    command = [sys.executable, "-c", script, __file__, str(tmp_path)]
    killed = subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert (killed.returncode, (tmp_path / "training.pt").exists()) == (-9, True), killed.stderr
    rest = Toy()
    assert fit(tmp_path, toy=rest) == whole
    assert len(rest.before) in {2, 7}  # the reader is ahead of the learner, who may not have been done with its step


@pytest.mark.parametrize("name", ["history.json", WEIGHTS])
def test_a_fit_that_was_stopped_while_it_finished_only_finishes(
    name: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Every step was saved before the weights are written."""

    def stop(_: Path) -> None:
        raise StoppedError

    toy = Toy()
    with pytest.raises(StoppedError):
        train_steps(replace(toy.learner(), save=stop), Watched(), OPTIONS, folder=tmp_path, device="cpu")
    (tmp_path / name).write_bytes(b"torn")
    rest = Toy()
    assert fit(tmp_path, toy=rest) == whole
    assert not rest.before


@pytest.mark.parametrize("change", [{"learning_rate": 0.02}, {"seed": 1}, {"batch_size": 4}, {"ema_decay": None}])
def test_a_fit_with_other_options_starts_anew(change: dict[str, float | None], tmp_path: Path) -> None:
    """What an unfinished fit with other options learnt is not used."""
    with pytest.raises(StoppedError):
        fit(tmp_path / "stopped", tiles=Watched(fail_at_read=12))
    other = OPTIONS.model_copy(update=change)
    assert fit(tmp_path / "stopped", other) == fit(tmp_path / "whole", other)


def test_a_fit_on_other_tiles_or_of_another_detector_starts_anew(tmp_path: Path) -> None:
    """What was learnt from other tiles is not used."""
    with pytest.raises(StoppedError):
        fit(tmp_path / "stopped", tiles=Watched(fail_at_read=12))
    assert fit(tmp_path / "stopped", tiles=Watched(24)) == fit(tmp_path / "whole", tiles=Watched(24))
    toy = Toy()
    other = replace(toy.learner(), recipe={"toy": 2})
    train_steps(other, Watched(24), OPTIONS, folder=tmp_path / "whole", device="cpu")
    assert toy.before


@pytest.mark.parametrize("change", [{"save_every": 2}, {"picture_every": 3}])
def test_how_often_a_fit_is_saved_and_drawn_changes_no_file(
    change: dict[str, int], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """And an unfinished fit goes on when it is changed."""
    with pytest.raises(StoppedError):
        fit(tmp_path, tiles=Watched(fail_at_read=12))
    rest = Toy()
    assert fit(tmp_path, OPTIONS.model_copy(update=change), toy=rest) == whole
    assert len(rest.before) == 7


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"\x80\x02}."])
def test_a_damaged_training_state_is_no_obstacle(
    content: bytes, whole: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The fit starts anew, and says so."""
    (tmp_path / "training.pt").write_bytes(content)
    assert fit(tmp_path) == whole
    assert "the unfinished fit is damaged, starting anew" in caplog.text


def test_a_finished_fit_is_not_done_again(tmp_path: Path) -> None:
    """Whoever was killed after the last step loses nothing, and what is superfluous goes."""
    files = fit(tmp_path)
    (tmp_path / "training.pt").write_bytes(b"the fit was killed before it could remove this")
    again = Watched()
    assert fit(tmp_path, tiles=again) == files
    assert again.asked == [[0, 19]]


def test_an_unfinished_fit_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    """Nobody can take old weights for new ones."""
    fit(tmp_path)
    with pytest.raises(StoppedError):
        fit(tmp_path, OPTIONS.model_copy(update={"seed": 1}), tiles=Watched(fail_at_read=12))
    assert [path.name for path in tmp_path.iterdir()] == ["training.pt"]


def test_every_tile_comes_once_in_an_epoch_and_batches_are_always_full() -> None:
    """A batch may reach into the next epoch, which has another order."""
    order = TileOrder(5, seed=0)
    row = np.concatenate([order.positions(step, 3) for step in range(5)])
    epochs = row.reshape(3, 5)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [[0, 1, 2, 3, 4]] * 3
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    assert order.positions(0, 12).tolist() == row[:12].tolist()


def test_draws_are_a_function_of_seed_and_step() -> None:
    """They reach every timestep, about equally often, and differ between steps and seeds."""
    first = draws(7, 5000, timesteps=10, seed=1)
    assert np.array_equal(first.seeds, draws(7, 5000, timesteps=10, seed=1).seeds)
    assert np.bincount(first.timesteps, minlength=11) == pytest.approx([500] * 10 + [0], abs=100)
    others = [draws(8, 5000, timesteps=10, seed=1), draws(7, 5000, timesteps=10, seed=2)]
    assert len({seed for one in (first, *others) for seed in one.seeds.tolist()}) == 15_000


def test_the_loss_gets_the_tiles_of_each_step_where_they_stand_and_what_was_drawn(plain: Toy) -> None:
    """Step by step, a whole batch at once."""
    order = TileOrder(20, seed=0)
    assert plain.positions == [order.positions(step, 8).tolist() for step in range(12)]
    for step, drawn in enumerate(plain.drawn):
        wanted = draws(step, 8, timesteps=50, seed=0)
        assert np.array_equal(drawn.seeds, wanted.seeds)
        assert np.array_equal(drawn.timesteps, wanted.timesteps)


@pytest.mark.parametrize(("room", "halvings"), [(7, 1), (1, 3)])
def test_too_little_memory_halves_what_goes_through_at_once_and_changes_nothing_else(
    room: int, halvings: int, plain: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every tile keeps what was drawn for it. One line in the log for each halving."""
    toy = Toy(Small(room))
    fit(tmp_path, PLAIN, toy=toy)
    assert torch.allclose(toy.network.learnt.weight, plain.network.learnt.weight, rtol=0, atol=1e-6)
    for name in ("positions", "drawn"):
        setattr(toy, name, getattr(toy, name)[-12 * 2**halvings :])  # before that, what did not fit
    assert list(chain(*toy.positions)) == list(chain(*plain.positions))
    seeds, timesteps = ([getattr(one, name) for one in toy.drawn] for name in ("seeds", "timesteps"))
    assert np.array_equal(np.concatenate(seeds), np.concatenate([one.seeds for one in plain.drawn]))
    assert np.array_equal(np.concatenate(timesteps), np.concatenate([one.timesteps for one in plain.drawn]))
    assert len([line for line in messages(caplog) if "more memory than there is" in line]) == halvings


def test_a_fit_that_ran_out_of_memory_is_resumed_as_exactly(tmp_path: Path) -> None:
    """It finds out again how much goes through at once."""
    files = fit(tmp_path / "whole", toy=Toy(Small(room=7)))
    with pytest.raises(StoppedError):
        fit(tmp_path / "stopped", tiles=Watched(fail_at_read=12), toy=Toy(Small(room=7)))
    assert fit(tmp_path / "stopped", toy=Toy(Small(room=7))) == files


@pytest.mark.parametrize("checkpointing", [False, True])
def test_too_little_memory_for_one_tile_is_an_error_that_says_what_to_do(
    checkpointing: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    """Running out of device memory is no bug."""

    def loss(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    learner = replace(Toy().learner(), network=random_backbone("tiny").unet.requires_grad_(), loss=loss)
    options = OPTIONS.model_copy(update={"gradient_checkpointing": checkpointing, "batch_size": 1})
    with pytest.raises(OptionsError, match="too little memory to learn from even one tile") as caught:
        train_steps(learner, Watched(), options, folder=tmp_path, device="cpu")
    assert ("Set gradient_checkpointing = true" in str(caught.value)) is not checkpointing
    assert "smaller tiles" in str(caught.value)


def test_gradient_checkpointing_changes_nothing_that_an_adapter_learns(tmp_path: Path) -> None:
    """And the adapter learns: it no longer is what it was."""
    learnt = []
    for checkpointing in (False, True):
        unet = random_backbone("tiny").unet
        first = [parameter.detach().clone() for parameter in add_lora(unet, LoraOptions(), seed=0)]

        def loss(
            batch: TileBatch, _: Int64[np.ndarray, " tile"], drawn: Draws, unet: UNet2DConditionModel = unet
        ) -> Float[torch.Tensor, " tile"]:
            noise, texts = (
                torch.from_numpy(tile_noise(drawn.seeds, shape, draw=draw))
                for draw, shape in enumerate(((4, 8, 8), (5, 32)))
            )
            predicted = unet(noise + batch.pixels.mean() / 255, torch.from_numpy(drawn.timesteps), texts).sample
            return (predicted - noise).square().mean(dim=(1, 2, 3))

        learner = replace(Toy().learner(), network=unet, loss=loss, rebuild=lambda batch: batch.pixels)
        learner = replace(learner, save=partial(save_lora, unet), weights=LORA_WEIGHTS)
        options = PLAIN.model_copy(update={"gradient_checkpointing": checkpointing, "steps": 2, "batch_size": 2})
        train_steps(learner, Watched(), options, folder=tmp_path / str(checkpointing), device="cpu")
        learnt.append(load_file(tmp_path / str(checkpointing) / LORA_WEIGHTS))
    assert all(torch.allclose(learnt[0][name], learnt[1][name], rtol=0, atol=1e-6) for name in learnt[0])
    assert not any(any(torch.equal(old, new) for old in first) for new in learnt[0].values())


def test_long_gradients_are_shortened_at_every_step(tmp_path: Path) -> None:
    """Short ones are not lengthened."""
    for factor, norm in ((1e6, 0.5), (1e-6, 0.0)):
        toy = Toy(factor=lambda _, factor=factor: factor)
        fit(tmp_path / str(factor), PLAIN.model_copy(update={"max_grad_norm": 0.5}), toy=toy)
        gradients = [parameter.grad for parameter in toy.network.learnt.parameters()]
        assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(norm, abs=1e-4)


def test_the_moving_average_is_what_is_saved(tmp_path: Path) -> None:
    """Its decay begins at zero, rises as (1 + n) / (10 + n), and ends at the option."""
    toy = Toy()
    fit(tmp_path, OPTIONS.model_copy(update={"ema_decay": 0.4}), toy=toy)
    trail = [*toy.before[1:], toy.network.learnt.weight.detach()]
    average = trail[0].double()
    for n, after in enumerate(trail[1:], start=1):
        decay = min(0.4, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * after
    assert torch.allclose(weights(tmp_path).double(), average, rtol=0, atol=1e-6)
    assert not torch.allclose(weights(tmp_path), trail[-1], rtol=0, atol=1e-3)


def test_averaging_and_drawing_do_not_change_what_is_learnt(plain: Toy, tmp_path: Path) -> None:
    """The averaged weights are put in and taken out again to the bit."""
    averaged = Toy()
    fit(tmp_path, OPTIONS.model_copy(update={"picture_every": 4}), toy=averaged)
    assert all(torch.equal(*pair) for pair in zip(averaged.before, plain.before, strict=True))
    assert torch.equal(averaged.network.learnt.weight, plain.network.learnt.weight)
    assert not torch.equal(plain.network.learnt.weight, weights(tmp_path))


@pytest.mark.parametrize(("options", "count"), [(OPTIONS, 20), (PLAIN, 3)], ids=["averaged", "plain"])
def test_the_pictures_show_tiles_and_what_the_finished_weights_make_of_them(
    options: DiffusionTrainingOptions, count: int, tmp_path: Path
) -> None:
    """At most eight, pixel by pixel, spread over all tiles."""
    tiles = Watched(count)
    fit(tmp_path, options, tiles=tiles)
    finished = Toy()
    finished.network.load_state_dict(load_file(tmp_path / WEIGHTS))
    with torch.no_grad():
        shown = tiles.read(np.unique(np.linspace(0, count - 1, 8).round().astype(np.int64)))
        rebuilt = finished.rebuild(shown)
    assert {tuple(asked) for asked in tiles.asked} >= {tuple(shown.seeds.tolist())}
    picture = pixels(tmp_path / "samples.png")
    windows = np.lib.stride_tricks.sliding_window_view(picture, (TILE_PX, TILE_PX, 3))[:, :, 0]
    for tile in (*shown.pixels, *rebuilt):
        assert (windows == tile).all(axis=(2, 3, 4)).any()
    assert pixels(tmp_path / "loss.png").shape == (550, 1000, 3)


def test_pictures_are_drawn_on_the_way(tmp_path: Path) -> None:
    """An unfinished fit can be looked at."""
    with pytest.raises(StoppedError):
        fit(tmp_path, OPTIONS.model_copy(update={"picture_every": 4}), tiles=Watched(fail_at_read=10))
    assert {path.name for path in tmp_path.iterdir()} == {"training.pt", "loss.png", "samples.png"}


def test_the_log_tells_how_fast_a_fit_is_and_how_long_it_will_take(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An estimate after twenty steps, then a line every fifty."""
    with caplog.at_level(logging.INFO, "wsi_anomaly"):
        fit(tmp_path, PLAIN.model_copy(update={"steps": 110}))
    lines = messages(caplog)
    assert "steps/s, on the CPU: about" in lines[0]
    assert "for 110 of 110 steps" in lines[0]
    assert [line.split(": loss")[0] for line in lines[1:]] == [f"step {step} of 110" for step in (50, 100, 110)]
    assert all(line.endswith(" left") for line in lines[1:])


def test_a_step_whose_gradient_is_no_number_changes_nothing(tmp_path: Path) -> None:
    """The fit goes on, and its history leaves the step out."""
    toy = Toy(factor=lambda call: float("nan") if call == 4 else 1.0)
    fit(tmp_path, PLAIN, toy=toy)
    assert torch.equal(toy.before[3], toy.before[4])
    assert not torch.equal(toy.before[4], toy.before[5])
    losses = [window["mean"] for window in json.loads((tmp_path / "history.json").read_bytes())["loss"]]
    assert [step for step, loss in enumerate(losses) if loss is None] == [3]


@pytest.mark.parametrize(("steps", "good", "failed"), [(100, 30, 20), (6, 0, 6)])
def test_a_loss_that_stays_no_number_is_an_error(steps: int, good: int, failed: int, tmp_path: Path) -> None:
    """The message says since when, and what to change."""
    toy = Toy(factor=lambda call: float("inf") if call > good else 1.0)
    with pytest.raises(ModelError, match=rf"has been inf for {failed} steps.* lower learning_rate \(now 0.01\)"):
        fit(tmp_path, PLAIN.model_copy(update={"steps": steps}), toy=toy)


def test_a_fit_without_tiles_is_refused(tmp_path: Path) -> None:
    """The message says where tiles come from."""
    with pytest.raises(CohortError, match="no normal tiles to learn from"):
        fit(tmp_path, tiles=Watched(0))


def test_one_tile_is_enough_to_go_on(tmp_path: Path) -> None:
    """It comes again and again, with other noise."""
    toy = Toy()
    assert set(fit(tmp_path, tiles=Watched(1), toy=toy)) == LEFT
    assert len(set(np.concatenate([one.seeds for one in toy.drawn]).tolist())) == 96


def test_training_leaves_the_process_and_the_network_as_they_were(tmp_path: Path) -> None:
    """Random states, what accelerate decided for its caller, and how the network is called."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    mine = Accelerator(cpu=True, mixed_precision="bf16")
    toy = Toy()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 - it is what must not change
    names = set(vars(toy.network))
    for folder in ("first", "second"):
        fit(tmp_path / folder, toy=toy)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert mine.mixed_precision == "bf16"
    assert set(vars(toy.network)) == names
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001


def test_a_network_that_draws_is_resumed_as_exactly(tmp_path: Path) -> None:
    """Torch's own random state is set at each step."""

    class Forgetful(Small):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(images), 0.3)

    files = fit(tmp_path / "whole", toy=Toy(Forgetful()))
    with pytest.raises(StoppedError):
        fit(tmp_path / "stopped", tiles=Watched(fail_at_read=12), toy=Toy(Forgetful()))
    assert fit(tmp_path / "stopped", toy=Toy(Forgetful())) == files != fit(tmp_path / "other")


def test_gradient_checkpointing_is_refused_where_the_network_has_none(tmp_path: Path) -> None:
    """Only networks of diffusers know how."""
    with pytest.raises(OptionsError, match="gradient_checkpointing: a Small cannot"):
        fit(tmp_path, OPTIONS.model_copy(update={"gradient_checkpointing": True}))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_fit_on_a_gpu_learns_in_each_precision(precision: str, tmp_path: Path) -> None:
    """One after another in one process, and what is learnt stays in float32."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    class OnGpu(Small):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images.cuda()).cpu()

    toy = Toy(OnGpu())
    options = PLAIN.model_copy(update={"steps": 300, "precision": precision})
    train_steps(toy.learner(), Watched(), options, folder=tmp_path, device="cuda")
    losses = [window["mean"] for window in json.loads((tmp_path / "history.json").read_bytes())["loss"]]
    assert np.mean(losses[-30:]) < np.mean(losses[20:23]) / 2
    assert weights(tmp_path).dtype == torch.float32


if __name__ == "__main__":  # in another process, to be killed
    torch.set_num_threads(1)
    fit(Path(sys.argv[-1]), tiles=Watched(die_at_read=13))
