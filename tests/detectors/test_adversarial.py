"""Facts about learning in turns, with two networks of two numbers: who learns when, what is resumed and left behind."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int64
from torch import nn

from wsi_anomaly.detectors.adversarial import AdversarialLearner, AdversarialOptions, Turn, train_in_turns
from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.detectors.weights import copy_of, save_weights
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.testing import TilesInMemory, smooth_tiles

OPTIONS = AdversarialOptions(batch_size=4, learning_rate=0.05, save_every=2)
STEPS = 7


class StoppedError(Exception):
    """What stands in for a crash in these tests."""


class Watched(TilesInMemory):
    """Remembers what was asked for, and fails at a chosen read."""

    def __init__(self, count: int = 12, *, fail_at_read: int = 0) -> None:
        super().__init__(smooth_tiles(count, 4, seed=0))
        self.asked: list[list[int]] = []
        self._fail_at_read = fail_at_read

    def read(self, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        """The tiles at these positions, unless it is time to fail."""
        self.asked.append(indices.tolist())
        if len(self.asked) == self._fail_at_read:
            raise StoppedError
        return super().read(indices)


def two_sides(options: AdversarialOptions = OPTIONS) -> AdversarialLearner:
    """A judge that learns in every step, and a maker that follows it in every second one, both with noise."""
    network = nn.ModuleDict({"judge": nn.Linear(1, 1), "maker": nn.Linear(1, 1)})
    for weights in network.parameters():
        nn.init.constant_(weights, 0.1)

    def optimizer(name: str) -> torch.optim.Optimizer:
        return torch.optim.Adam(network[name].parameters(), options.learning_rate)

    def judging(batch: TileBatch, draws: torch.Generator) -> Float[torch.Tensor, ""]:
        brightness = torch.tensor(batch.pixels).float().mean(dim=(1, 2, 3))[:, None] / 255
        made = network["maker"](torch.randn(len(batch), 1, generator=draws))
        return (network["judge"](brightness) - 1).square().mean() + network["judge"](made).square().mean()

    def making(batch: TileBatch, draws: torch.Generator) -> Float[torch.Tensor, ""]:
        made = network["maker"](torch.randn(len(batch), 1, generator=draws))
        return (network["judge"](made) - 1).square().mean()

    return AdversarialLearner(
        network,
        {"judge": Turn(optimizer("judge"), judging), "maker": Turn(optimizer("maker"), making, lambda n: n % 2 == 0)},
        steps=STEPS,
        save=lambda folder: save_weights(network, folder, {"detector": "two sides"}),
        recipe=options.model_dump(mode="json"),
    )


def fit(tiles: TilesInMemory, folder: Path, options: AdversarialOptions = OPTIONS) -> dict[str, bytes]:
    """Learn, and return every file that is left."""
    train_in_turns(two_sides(options), tiles, options, folder=folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_fit_leaves_weights_and_history_and_nothing_else(tmp_path: Path) -> None:
    """The history tells steps and tiles, and the loss of each turn where it was due."""
    files = fit(Watched(), tmp_path / "new" / "folder")
    assert set(files) == {"weights.safetensors", "history.json"}
    history = json.loads(files["history.json"])
    assert (history["steps"], history["tiles"]) == (STEPS, 12)
    assert [entry["up_to_step"] for entry in history["loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert all("judge" in entry for entry in history["loss"])
    assert ["maker" in entry for entry in history["loss"]] == [False, True] * 3 + [False]


def test_each_step_learns_from_a_whole_batch_and_each_tile_comes_equally_often(tmp_path: Path) -> None:
    """Three steps of four tiles go once over twelve."""
    tiles = Watched()
    fit(tiles, tmp_path)
    steps = tiles.asked[1:]  # the first read looks at the ends
    assert [len(indices) for indices in steps] == [4] * STEPS
    for once in (steps[:3], steps[3:6]):
        assert sorted(chain(*once)) == list(range(12))
    assert steps[:3] != steps[3:6]


def test_while_one_side_learns_the_other_stands_still_and_gathers_no_gradient(tmp_path: Path) -> None:
    """Seen from inside the losses, where the weights are as the turn before left them."""
    learner, seen = two_sides(), []
    judging = learner.turns["judge"].loss

    def watching(batch: TileBatch, draws: torch.Generator) -> Float[torch.Tensor, ""]:
        seen.append(copy_of(learner.network))
        assert not any(weights.requires_grad for weights in learner.network["maker"].parameters())
        assert all(weights.requires_grad for weights in learner.network["judge"].parameters())
        return judging(batch, draws)

    turns = {**learner.turns, "judge": replace(learner.turns["judge"], loss=watching)}
    train_in_turns(replace(learner, turns=turns), Watched(), OPTIONS, folder=tmp_path)
    made = [weights["maker.weight"].item() for weights in seen]
    assert made[0] == made[1] != made[2] == made[3] != made[4]
    assert len({weights["judge.weight"].item() for weights in seen}) == STEPS


def test_a_turn_may_change_its_learning_rate_with_the_step(tmp_path: Path) -> None:
    """With a rate of nothing from the third step on, nothing changes any more."""
    learner, seen = two_sides(), []

    def rate(step: int) -> float:
        seen.append((step, learner.network["judge"].weight.item()))
        return 0.05 if step < 3 else 0.0

    turns = {"judge": replace(learner.turns["judge"], learning_rate=rate)}
    train_in_turns(replace(learner, turns=turns), Watched(), OPTIONS, folder=tmp_path)
    assert [step for step, _ in seen] == list(range(1, STEPS + 1))
    assert len({weight for _, weight in seen[:3]}) == 3
    assert len({weight for _, weight in seen[2:]}) == 1


@pytest.mark.parametrize("fail_at_read", [2, 4, 5, 8])
def test_an_interrupted_fit_goes_on_and_ends_with_the_same_files(fail_at_read: int, tmp_path: Path) -> None:
    """Wherever it stopped, before the first saving and after the last."""
    with pytest.raises(StoppedError):
        fit(Watched(fail_at_read=fail_at_read), tmp_path / "stopped")
    rest = Watched()
    assert fit(rest, tmp_path / "stopped") == fit(Watched(), tmp_path / "whole")
    assert len(rest.asked) <= 1 + STEPS


def test_a_fit_that_was_killed_while_it_wrote_its_weights_has_nothing_to_learn_again(tmp_path: Path) -> None:
    """All steps are saved by then."""

    def fail(_: Path) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        train_in_turns(replace(two_sides(), save=fail), Watched(), OPTIONS, folder=tmp_path / "stopped")
    rest = Watched()
    assert fit(rest, tmp_path / "stopped") == fit(Watched(), tmp_path / "whole")
    assert rest.asked == [[0, 11]]


def test_a_fit_with_other_options_or_tiles_starts_anew(tmp_path: Path) -> None:
    """What an unfinished fit learnt is used for the same only."""
    other = OPTIONS.model_copy(update={"learning_rate": 0.01})
    for number, (tiles, options) in enumerate([(12, other), (16, OPTIONS)]):
        with pytest.raises(StoppedError):
            fit(Watched(fail_at_read=7), tmp_path / f"stopped {number}")
        anew = fit(Watched(tiles), tmp_path / f"stopped {number}", options)
        assert anew == fit(Watched(tiles), tmp_path / f"whole {number}", options)


def test_a_finished_fit_is_not_done_again(tmp_path: Path) -> None:
    """Also where it was killed before it removed its last state."""
    files = fit(Watched(), tmp_path)
    (tmp_path / "training.pt").write_bytes(b"left over")
    again = Watched()
    assert fit(again, tmp_path) == files
    assert again.asked == [[0, 11]]


def test_an_unfinished_fit_leaves_no_weights_of_an_earlier_one(tmp_path: Path) -> None:
    """Nobody can take old weights for new ones."""
    fit(Watched(), tmp_path)
    with pytest.raises(StoppedError):
        fit(Watched(fail_at_read=6), tmp_path, OPTIONS.model_copy(update={"seed": 1}))
    assert [path.name for path in tmp_path.iterdir()] == ["training.pt"]


def test_learning_leaves_the_random_state_of_its_caller_alone(tmp_path: Path) -> None:
    """It is neither seeded nor used up."""
    learner, before = two_sides(), torch.get_rng_state()
    train_in_turns(learner, Watched(), OPTIONS, folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_no_number_is_an_error_that_names_the_side(tmp_path: Path) -> None:
    """The message says which step, and what to lower; no weights are left."""
    learner = two_sides()
    broken = replace(learner.turns["maker"], loss=lambda *_: learner.network["maker"].weight.sum() * float("nan"))
    turns = {**learner.turns, "maker": broken}
    with pytest.raises(ModelError, match=r"step 2: the loss of the maker is nan. Lower learning_rate \(now 0.05\)"):
        train_in_turns(replace(learner, turns=turns), Watched(), OPTIONS, folder=tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()


def test_too_large_a_batch_is_an_error_that_says_what_to_lower(tmp_path: Path) -> None:
    """Running out of device memory is no bug."""

    def loss(_batch: TileBatch, _draws: torch.Generator) -> Float[torch.Tensor, ""]:
        raise torch.OutOfMemoryError

    learner = two_sides()
    turns = {"judge": replace(learner.turns["judge"], loss=loss)}
    with pytest.raises(OptionsError, match=r"too little memory to learn from 4 tiles at once. Lower batch_size"):
        train_in_turns(replace(learner, turns=turns), Watched(), OPTIONS, folder=tmp_path)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tiles_are_refused(count: int, tmp_path: Path) -> None:
    """The message says how many there are and how many are needed."""
    with pytest.raises(CohortError, match=f"learn from: {count}, needed: at least 2"):
        fit(Watched(count), tmp_path)
