"""Facts about SimSID beyond the contract: its memory, its neighbours, its gradients, its sign, what it refuses."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsi_anomaly.detectors import simsid
from wsi_anomaly.detectors.simsid import SimSid, SimSidNetwork, SimSidScorer, SimSidTraining, moved
from wsi_anomaly.detectors.simsid_networks import Inpainting, Sizes, into_images, into_patches, neighbours, shrunk
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.options import parse_options
from wsi_anomaly.testing import DetectorContract, TilesInMemory, batch_of, odd_tiles, smooth_tiles

TINY = SimSid(
    image_px=32,
    grid=2,
    width=4,
    slots=20,
    training=SimSidTraining(batch_size=8, learning_rate=2e-3, steps=60, save_every=10),
)
PLACED = TINY.model_copy(update={"memory": "position"})
SIZES = Sizes(32, 2, 4, "free", slots=20, active=5)


class TestSimSid(DetectorContract):
    """The contract, with one memory for all places."""

    detector = TINY


@pytest.fixture(scope="module")
def tiles() -> TilesInMemory:
    """Normal tiles to learn from."""
    return TilesInMemory(smooth_tiles(24, 32, seed=1))


@pytest.fixture(scope="module")
def checkpoint(fitted: Callable[..., Path], tiles: TilesInMemory) -> Path:
    """A fitted tiny SimSID."""
    return fitted(TINY, tiles)


@given(st.integers(1, 8), st.integers(0, 99))
def test_exactly_as_many_items_stay_active_as_are_asked_for(active: int, seed: int) -> None:
    """The largest ones, in the same proportions, with a sum of one; one item alone has all the weight."""
    weights = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)
    kept = shrunk(weights, active)
    assert (kept > 0).sum(dim=-1).tolist() == [active] * 3
    assert torch.allclose(kept.sum(dim=-1), torch.ones(3))
    largest = weights.topk(active, dim=-1)
    assert torch.allclose(kept.gather(-1, largest.indices), largest.values / largest.values.sum(-1, keepdim=True))


def test_equal_weights_do_not_let_more_items_through() -> None:
    """And more items than there are cannot be asked for: then all stay."""
    assert int((shrunk(torch.full((8,), 0.125), 5) > 0).sum()) == 5
    assert torch.equal(shrunk(torch.tensor([0.25, 0.75]), 5), torch.tensor([0.25, 0.75]))


def test_items_that_are_not_active_learn_too() -> None:
    """The gradient is that of all weights, as if nothing had been cut off."""
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)
    (shrunk(weights, 2) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_each_place_has_the_neighbours_around_it() -> None:
    """A corner three of them, an edge five, the middle all eight."""
    near, absent = neighbours(3)
    assert near[4].tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert sorted(near[0][~absent[0]].tolist()) == [1, 3, 4]
    assert (~absent).sum(dim=1).tolist() == [3, 5, 3, 5, 8, 5, 3, 5, 3]


def test_a_patch_is_painted_by_its_neighbours_alone() -> None:
    """What the memory holds of the patch itself, or of patches farther off, changes nothing."""
    torch.manual_seed(0)
    paint = Inpainting(3, 16).eval()
    tokens, remembered = torch.randn(2, 1, 9, 16)
    before = paint(tokens, remembered)
    for place, changed in [(0, {1, 3, 4}), (4, {0, 1, 2, 3, 5, 6, 7, 8})]:
        other = remembered.clone()
        other[:, place] += 1
        apart = (paint(tokens, other) - before).abs().amax(dim=(0, 2)) > 1e-6
        assert set(apart.nonzero().flatten().tolist()) == changed


def test_patches_make_up_their_images_again() -> None:
    """Row by row, image by image."""
    images = torch.arange(2 * 3 * 8 * 8).float().reshape(2, 3, 8, 8)
    patches = into_patches(images, 2)
    assert torch.equal(patches[1], images[0, :, :4, 4:])
    assert torch.equal(patches[4], images[1, :, :4, :4])
    assert torch.equal(into_images(patches, 2), images)


def test_images_to_learn_from_move_a_little_and_each_otherwise() -> None:
    """A bright spot in the middle lands within 5 % of the side of where it was, scaled by at most 5 %."""
    spot = torch.zeros(50, 1, 64, 64)
    spot[:, :, 40, 24] = 1
    found = moved(spot, torch.Generator().manual_seed(0)).flatten(start_dim=1).argmax(dim=1)
    rows, columns = found // 64, found % 64
    for places, before in ((rows, 40), (columns, 24)):
        assert 1 < (places - before).abs().max() <= 0.05 * 64 + 0.05 * 9 + 1
        assert len(set(places.tolist())) > 3


def gradients_of(network: SimSidNetwork, part: str) -> torch.Tensor:
    """Of the rebuilding loss, for all weights of a part of the network."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network.zero_grad()
    network.train().rebuilding_loss(images).backward()
    gradients = [weights.grad for weights in network.get_submodule(part).parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_the_teacher_teaches_the_encoder_nothing() -> None:
    """Its images may be as wrong as they like: only the teacher itself learns from that."""
    network = SimSidNetwork(SIZES, seed=0)
    encoder, teacher = (gradients_of(network, part) for part in ("encoder", "teacher"))
    torch.nn.init.constant_(network.teacher.last[0].bias, 0.5)
    assert torch.equal(gradients_of(network, "encoder"), encoder)
    assert not torch.equal(gradients_of(network, "teacher"), teacher)


def test_the_student_follows_the_teacher_and_not_the_other_way_round() -> None:
    """Where the student's features change, the teacher learns nothing else."""
    network = SimSidNetwork(SIZES, seed=0)
    teacher, student = (gradients_of(network, part) for part in ("teacher", "student"))
    torch.nn.init.uniform_(network.student.memories[1].items, 0, 1)
    assert torch.equal(gradients_of(network, "teacher"), teacher)
    assert not torch.equal(gradients_of(network, "student"), student)


@pytest.mark.parametrize("wanted", ["rebuilt", "real"])
def test_a_step_against_the_loss_makes_the_student_better(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images come nearer to the tiles, and look more real, each where all other parts count nothing."""
    others = {"rebuilt": "UNREAL_WEIGHT", "real": "STUDENT_WEIGHT"}[wanted]
    for name in (others, "TEACHER_WEIGHT", "APART_WEIGHT"):
        monkeypatch.setattr(simsid, name, 0.0)
    network = SimSidNetwork(SIZES, seed=0).eval()
    images = torch.from_numpy(smooth_tiles(4, 32, seed=2)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def lacking() -> float:
        with torch.no_grad():
            rebuilt = network.student_images(images)
            faults = {"rebuilt": (rebuilt - images).square(), "real": -network.discriminator(rebuilt)}
            return faults[wanted].mean().item()

    before, student = lacking(), list(network.student.parameters())
    gradients = torch.autograd.grad(network.rebuilding_loss(images), student, allow_unused=True)
    size = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
    with torch.no_grad():
        for weights, gradient in zip(student, gradients, strict=True):
            weights.sub_(0 if gradient is None else 0.01 * gradient / size)
    assert lacking() < before


def test_the_score_is_standardised_by_the_tiles_that_were_learnt_from(checkpoint: Path, tiles: TilesInMemory) -> None:
    """Of those, as they are, it has mean 0 and deviation 1."""
    scores = TINY.load(checkpoint, device="cpu").score(tiles.read(np.arange(len(tiles))))
    assert scores.mean() == pytest.approx(0, abs=1e-3)
    assert scores.std() == pytest.approx(1, abs=1e-3)


def test_what_the_discriminator_finds_real_scores_low(checkpoint: Path) -> None:
    """The other way round than the paper's own score."""
    scorer, batch = TINY.load(checkpoint, device="cpu"), batch_of(odd_tiles(6, 32, seed=5))
    with torch.inference_mode():
        realness = scorer.network.realness(torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).float() / 255).numpy()
    assert scorer.score(batch)[:, 0].argsort().tolist() == (-realness).argsort().tolist()


def test_a_memory_of_each_place_is_as_many_times_as_large(tmp_path: Path, tiles: TilesInMemory) -> None:
    """And works as well."""
    short = PLACED.model_copy(update={"training": TINY.training.model_copy(update={"steps": 2})})
    short.fit(tiles, tmp_path, device="cpu")
    scorer = short.load(tmp_path, device="cpu")
    assert np.isfinite(scorer.score(batch_of(odd_tiles(3, 32, seed=5)))).all()
    assert scorer.network.memory.items.shape == (4, 20, 64)
    assert SimSidNetwork(SIZES, seed=0).memory.items.shape == (1, 20, 64)


def test_tiles_of_any_size_are_resized(checkpoint: Path) -> None:
    """And come back as large as they were."""
    scorer, batch = TINY.load(checkpoint, device="cpu"), batch_of(smooth_tiles(3, 50, seed=1))
    assert scorer.score(batch).shape == (3, 1)
    assert scorer.reconstruct(batch).shape == (3, 50, 50, 3)


def test_scores_of_wide_networks_do_not_depend_on_the_batch() -> None:
    """Bit for bit, with the kernels that full-sized layers get; the token is half as wide as by default."""
    network = SimSidNetwork(Sizes(128, 4, 16, "free", slots=100, active=5), seed=0).eval()
    scorer = SimSidScorer(network, torch.device("cpu"))
    tiles = np.concatenate([smooth_tiles(2, 128, seed=1), odd_tiles(1, 128, seed=2)])
    alone = [scorer.score(batch_of(tiles[[i]]))[0] for i in range(len(tiles))]
    assert np.array_equal(scorer.score(batch_of(tiles[::-1].copy())), np.array(alone)[::-1])


def test_constant_tiles_neither_crash_nor_give_anything_but_numbers(tmp_path: Path) -> None:
    """To learn from, where all look equally real, and to score."""
    flat = np.full((8, 32, 32, 3), 200, np.uint8)
    short = TINY.model_copy(update={"training": TINY.training.model_copy(update={"steps": 4})})
    short.fit(TilesInMemory(flat), tmp_path, device="cpu")
    scorer = short.load(tmp_path, device="cpu")
    for value in (0, 200, 255):
        assert np.isfinite(scorer.score(batch_of(np.full_like(flat, value)))).all()


def test_a_single_tile_is_refused(tmp_path: Path) -> None:
    """The message says how many are needed."""
    with pytest.raises(CohortError, match="learn from: 1, needed: at least 2"):
        TINY.fit(TilesInMemory(smooth_tiles(1, 32, seed=1)), tmp_path, device="cpu")


def test_weights_of_other_options_or_another_detector_are_refused_by_name(checkpoint: Path, spoilt: Path) -> None:
    """The message names what differs."""
    with pytest.raises(ModelError, match="memory is free, not position"):
        PLACED.load(checkpoint, device="cpu")
    path = spoilt / "weights.safetensors"
    path.write_bytes(path.read_bytes().replace(b'\\"simsid\\"', b'\\"simsiD\\"'))
    with pytest.raises(ModelError, match="detector is simsiD, not simsid"):
        TINY.load(spoilt, device="cpu")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"image_px": 96}, "power of two"),
        ({"image_px": 32}, "a multiple of 64"),
        ({"grid": 3}, "a multiple of 48"),
        ({"grid": 8, "width": 1, "image_px": 128, "slots": 0}, "slots"),
        ({"memory": "queue"}, "memory"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], fault: str) -> None:
    """By name, with what is possible."""
    with pytest.raises(OptionsError, match=fault):
        parse_options(SimSid, options, where="test")


@pytest.mark.slow
def test_fibrosis_looks_less_real_than_normal_tissue_and_metastases_do_not(
    tissue: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    """After seconds of learning; measured with two seeds: 0.83 and 0.62 for fibrosis, 0.58 and 0.48 for metastases."""
    training = TINY.training.model_copy(
        update={"batch_size": 16, "learning_rate": 1e-3, "steps": 200, "save_every": 1000}
    )
    small = TINY.model_copy(update={"width": 8, "slots": 50, "training": training})
    small.fit(TilesInMemory(tissue(range(16), 8, "normal")), tmp_path, device="cpu")
    scorer = small.load(tmp_path, device="cpu")
    normal = scorer.score(batch_of(tissue(range(100, 108), 5, "normal")))
    for kind, least, most in (("fibrosis", 0.65, 1.0), ("metastasis", 0.35, 0.75)):
        scores = scorer.score(batch_of(tissue(range(100, 108), 5, kind)))
        assert least < (scores > normal.T).mean() < most, kind
