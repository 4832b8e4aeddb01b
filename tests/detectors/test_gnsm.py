"""Facts about GNSM beyond the contract: which categories a tile has, what its network learns, what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import Field

from wsi_anomaly.detectors.gnsm import Gnsm, GnsmScorer, GnsmTraining
from wsi_anomaly.detectors.gnsm_network import GnsmNetwork, noise_loss, score_norms
from wsi_anomaly.detectors.protocol import Categorical, Detector, TileBatch, TileSource
from wsi_anomaly.detectors.training import TrainingOptions
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.options import Options
from wsi_anomaly.synthetic import synthetic_tiles
from wsi_anomaly.testing import DetectorContract, TilesInMemory, batch_of, smooth_tiles

TINY = Gnsm(
    width=32,
    blocks=1,
    training=GnsmTraining(learning_rate=3e-3, batch_size=64, max_epochs=40, held_out_fraction=0.4),
)
CATEGORIES = {"shade": (0, 1, 2, 3), "contrast": (4, 5, 6, 7), "edges": (8, 9, 10, 11)}


def described(batch: TileBatch) -> TileBatch:
    """The same tiles with scores of keywords that stand for how light, how varied and how rough a tile is."""
    pixels = batch.pixels.astype(np.float32)
    rough = np.abs(np.diff(pixels, axis=2)).mean(axis=(1, 2, 3)) if len(batch) else np.zeros(0, np.float32)
    facts = np.stack([pixels.mean(axis=(1, 2, 3)), pixels.std(axis=(1, 2, 3)), rough * 4], axis=1)
    centres = np.array([[100, 140, 180, 220], [10, 25, 40, 70], [4, 15, 40, 120]], np.float32)
    return replace(batch, keyword_scores=-np.abs(facts[:, :, None] - centres).reshape(len(batch), 12))


class Described(Options):
    """GNSM behind a stand-in for the prompt stage, so that the contract's tiles have keywords."""

    inner: Gnsm = Field(default_factory=Gnsm)

    @property
    def score_names(self) -> tuple[str, ...]:
        """Those of GNSM."""
        return self.inner.score_names

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Learn from the described tiles."""
        self.inner.on_categories(CATEGORIES).fit(DescribedTiles(tiles), checkpoint, device=device)

    def load(self, checkpoint: Path, *, device: str) -> "DescribedScorer":
        """The scorer, without being told the categories again."""
        return DescribedScorer(self.inner.load(checkpoint, device=device))


class DescribedTiles:
    """A source of described tiles."""

    def __init__(self, tiles: TileSource) -> None:
        self.tiles, self.groups, self.slides = tiles, tiles.groups, tiles.slides

    def __len__(self) -> int:
        return len(self.tiles)

    def read(self, indices: np.ndarray) -> TileBatch:
        """The tiles at these positions, in this order."""
        return described(self.tiles.read(indices))


class DescribedScorer:
    """Scores described tiles."""

    def __init__(self, scorer: GnsmScorer) -> None:
        self.scorer = scorer

    def score(self, batch: TileBatch) -> np.ndarray:
        """The scores of GNSM."""
        return self.scorer.score(described(batch))

    def scores_and_vectors(self, batch: TileBatch) -> tuple[np.ndarray, np.ndarray]:
        """With the norms of GNSM."""
        return self.scorer.scores_and_vectors(described(batch))


class TestGnsm(DetectorContract):
    """The contract, with keywords that are facts of the pixels."""

    detector = Described(inner=TINY)
    fit_tiles = 300

    @pytest.fixture(autouse=True)
    def _importable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """New processes find the stand-in of this file."""
        root = Path(__file__).parents[2]
        monkeypatch.setenv("PYTHONPATH", str(root))


def coded(codes: np.ndarray, cohort: np.ndarray | None = None) -> TileBatch:
    """Tiles whose top keywords are these, of three categories of four keywords."""
    scores = np.eye(4, dtype=np.float32)[codes].reshape(len(codes), -1)
    batch = batch_of(np.zeros((len(codes), 1, 1, 3), np.uint8))
    return replace(batch, keyword_scores=scores, categories=cohort)


class Coded(TilesInMemory):
    """A source of tiles with these top keywords and facts of the cohort."""

    def __init__(self, codes: np.ndarray, cohort: np.ndarray | None = None) -> None:
        super().__init__(np.zeros((len(codes), 1, 1, 3), np.uint8))
        self.codes, self.cohort = codes, cohort

    def read(self, indices: np.ndarray) -> TileBatch:
        """The tiles at these positions, in this order."""
        return coded(self.codes[indices], None if self.cohort is None else self.cohort[indices])


def normal_codes(count: int, seed: int) -> np.ndarray:
    """Three categories that take the values 0 to 2 together."""
    return np.repeat(np.random.default_rng(seed).integers(0, 3, (count, 1)), 3, axis=1)


SCANNED = TINY.model_copy(update={"columns": ("scanner",)})
LEARNT = SCANNED.on_categories(CATEGORIES)


@pytest.fixture(scope="module")
def checkpoint(fitted: Callable[..., Path]) -> Path:
    """GNSM fitted to three categories and one column of the cohort."""
    return fitted(LEARNT, Coded(normal_codes(400, 1), np.arange(400)[:, None] % 2))


def test_a_detector_of_categories_says_so() -> None:
    """The pipeline knows by the protocol whom to tell the categories of keywords."""
    assert isinstance(Gnsm(), Categorical)
    assert isinstance(Gnsm().on_categories(CATEGORIES), Detector)


def test_loading_needs_no_categories(checkpoint: Path) -> None:
    """They are in the folder: the scores are the same as for a detector that was told them."""
    batch = coded(normal_codes(9, 2), np.zeros((9, 1), np.int64))
    told = LEARNT.load(checkpoint, device="cpu").score(batch)
    assert np.array_equal(SCANNED.load(checkpoint, device="cpu").score(batch), told)


def test_other_categories_are_refused(checkpoint: Path) -> None:
    """A model belongs to the keywords that it was fitted with."""
    with pytest.raises(ModelError, match="other keyword categories"):
        SCANNED.on_categories({"all": tuple(range(12))}).load(checkpoint, device="cpu")


def test_keywords_never_seen_stand_out(checkpoint: Path) -> None:
    """A tile whose top keyword is on top of no normal tile scores higher than all normal ones."""
    scorer = SCANNED.load(checkpoint, device="cpu")
    cohort = np.zeros((3, 1), np.int64)
    odd = np.array([[3, 0, 0], [0, 3, 3], [3, 3, 3]])
    assert (
        scorer.score(coded(odd, cohort)).min() > scorer.score(coded(np.arange(3)[:, None].repeat(3, 1), cohort)).max()
    )


def test_numbers_of_values_may_be_any(tmp_path: Path) -> None:
    """Only which tiles have the same value counts: columns come as checksums of their cells."""
    numbers, codes = np.array([3_000_000_000, 5]), normal_codes(400, 1)
    LEARNT.fit(Coded(codes, numbers[np.arange(400) % 2][:, None]), tmp_path, device="cpu")
    scorer = SCANNED.load(tmp_path, device="cpu")
    known, new = (scorer.score(coded(codes[:2], np.full((2, 1), value))) for value in (3_000_000_000, 4))
    assert new.min() > known.max()


def test_values_of_the_cohort_that_were_not_seen_are_unknown(checkpoint: Path) -> None:
    """A value of no number and one of a new number are the same to the detector."""
    scorer, codes = SCANNED.load(checkpoint, device="cpu"), normal_codes(1, 3)
    missing, new = (scorer.score(coded(codes, np.array([[value]]))) for value in (-1, 7))
    assert np.array_equal(missing, new)
    assert missing[0, 0] > scorer.score(coded(codes, np.array([[1]])))[0, 0]


def test_tiles_without_the_cohort_s_columns_are_refused(checkpoint: Path) -> None:
    """The message names the columns, and says what to do."""
    with pytest.raises(OptionsError, match=r"1 columns of the cohort \(scanner\), and its tiles come with 0. Name the"):
        SCANNED.load(checkpoint, device="cpu").score(coded(normal_codes(2, 1)))


def test_other_columns_than_those_of_the_fit_are_refused(checkpoint: Path) -> None:
    """The message names both."""
    with pytest.raises(ModelError, match=r"with the columns \[scanner\] of the cohort, and the options ask for \[\]"):
        TINY.load(checkpoint, device="cpu")


def test_tiles_without_keywords_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    """The message says what the pipeline file lacks."""
    tiles = TilesInMemory(smooth_tiles(40, 8, seed=1))
    with pytest.raises(OptionsError, match=r"Add a table \[prompt\]"):
        TINY.fit(tiles, tmp_path, device="cpu")
    with pytest.raises(OptionsError, match=r"Add a table \[prompt\]"):
        SCANNED.load(checkpoint, device="cpu").score(tiles.read(np.arange(2)))


def test_categories_of_more_keywords_than_there_are_are_refused(tmp_path: Path) -> None:
    """The message names the column and how many there are."""
    with pytest.raises(OptionsError, match=r"column 12, .* scores of 12 keywords"):
        TINY.on_categories({"shade": (0, 12)}).fit(Coded(normal_codes(40, 1)), tmp_path, device="cpu")


def test_a_category_without_keywords_is_refused() -> None:
    """It has no top keyword."""
    with pytest.raises(OptionsError, match="'vessel' has no keywords"):
        TINY.on_categories({"cell": (0,), "vessel": ()})


def test_too_few_tiles_are_refused(tmp_path: Path) -> None:
    """The density needs some that the network did not learn from."""
    with pytest.raises(CohortError, match="needed: at least"):
        TINY.on_categories(CATEGORIES).fit(Coded(normal_codes(5, 1)), tmp_path, device="cpu")


def test_equal_tiles_are_learnt_without_harm(tmp_path: Path) -> None:
    """Constant variables have finite scores."""
    told = TINY.on_categories(CATEGORIES)
    told.fit(Coded(np.zeros((60, 3), np.int64)), tmp_path, device="cpu")
    scores = told.load(tmp_path, device="cpu").score(coded(np.array([[0, 0, 0], [3, 3, 3]])))
    assert np.isfinite(scores).all()


def test_a_finished_fit_is_left_as_it_is(checkpoint: Path) -> None:
    """Called again, it reads only what tells the tiles, and keeps nothing that is of no further use."""
    before = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    tiles = Coded(normal_codes(400, 1), np.arange(400)[:, None] % 2)
    LEARNT.fit(tiles, checkpoint, device="cpu")
    assert {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == before
    assert set(before) == {"weights.safetensors", "density.safetensors", "history.json", "variables.json"}


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", json.dumps({"format_version": 3}).encode()])
def test_spoilt_variables_are_refused(content: bytes, spoilt: Path) -> None:
    """Whatever became of the file."""
    (spoilt / "variables.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"variables\.json"):
        SCANNED.load(spoilt, device="cpu")


def test_weights_of_another_width_are_refused_by_name(checkpoint: Path) -> None:
    """The message names the option that differs, with both values."""
    with pytest.raises(ModelError, match="width is 32, not 16"):
        SCANNED.model_copy(update={"width": 16}).load(checkpoint, device="cpu")


SHARES = (0.6, 0.3, 0.1)
"""Of the three outcomes of one variable."""


def categorical(codes: np.ndarray) -> TileBatch:
    """Tiles of these categories, as the network's training sees them."""
    return replace(batch_of(np.zeros((len(codes), 1, 1, 3), np.uint8)), categories=codes)


@pytest.fixture(scope="module")
def of_one_variable() -> GnsmNetwork:
    """A network after a thousand steps of learning the outcomes of `SHARES`."""
    torch.manual_seed(0)
    network, random = GnsmNetwork((3,), 32, 1), np.random.default_rng(1)
    loss, optimizer = noise_loss(network, torch.device("cpu")), torch.optim.Adam(network.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        optimizer.zero_grad()
        loss(categorical(random.choice(3, (256, 1), p=SHARES)), generator).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


@pytest.mark.parametrize(("tau", "most"), [(20.0, 0.004), (2.0, 0.02)])
def test_the_network_tells_the_mean_noise_given_what_it_sees(
    of_one_variable: GnsmNetwork, tau: float, most: float
) -> None:
    """softmax(log a - tau x), averaged over the categories a by how likely each is at x (thesis, chapter 4).

    At x the density of the concrete distribution of a is proportional to exp(sum(e) - K logsumexp(e)) with
    e = log a - tau x. Gumbel noise of the other sign is 0.008 off at the highest temperature, and learnt noise that is
    added to x in place of taken away 0.4.
    """
    clean, generator = torch.eye(3).double().clamp_min(1e-5).log(), torch.Generator().manual_seed(3)
    drawn = torch.multinomial(torch.tensor(SHARES), 500, replacement=True, generator=generator)
    gumbel = -(-torch.rand(500, 3, generator=generator, dtype=torch.float64).log()).log()
    noisy = ((clean[drawn] + gumbel) / tau).log_softmax(1)
    exponents = clean[None] - tau * noisy[:, None]
    likely = (exponents.sum(2) - 3 * exponents.logsumexp(2) + torch.tensor(SHARES).log()).softmax(1)
    wanted = (likely[..., None] * exponents.softmax(2)).sum(1)
    with torch.no_grad():
        told = of_one_variable.normalized(of_one_variable(noisy.float(), torch.full((500,), tau))).exp()
    assert (told - wanted).abs().mean().item() < most


class Constant(GnsmNetwork):
    """Tells the same of any tile, and remembers what it was asked."""

    def __init__(self, outcomes: tuple[int, ...], logits: torch.Tensor) -> None:
        super().__init__(outcomes, 8, 1)
        self.logits, self.asked = logits, list[tuple[torch.Tensor, torch.Tensor]]()

    def forward(self, noisy: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """These logits."""
        self.asked.append((noisy, tau))
        return self.logits.expand(len(noisy), -1)


def test_the_loss_is_the_divergence_weighted_by_temperature_and_number_of_outcomes() -> None:
    """tau^2 K^2 KL(softmax(log a - tau x) | what is told), summed over variables of 2 and 3 outcomes."""
    told, codes = torch.tensor([0.5, -0.2, 1.0, 0.3, -0.7]), np.array([[0, 2], [1, 1], [1, 0]])
    network = Constant((2, 3), told)
    found = noise_loss(network, torch.device("cpu"))(categorical(codes), torch.Generator().manual_seed(0))
    ((noisy, tau),) = network.asked
    wanted = torch.zeros(3)
    for part, count, column in ((slice(0, 2), 2, 0), (slice(2, 5), 3, 1)):
        clean = torch.eye(count).clamp_min(1e-5).log()[codes[:, column]]
        true = (clean - tau[:, None] * noisy[:, part]).softmax(1)
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Categorical(true), torch.distributions.Categorical(logits=told[part])
        )
        wanted += tau**2 * count**2 * divergence
    assert found.item() == pytest.approx(wanted.mean().item(), rel=1e-4)


def test_a_score_is_what_the_noise_told_makes_of_the_concrete_distribution() -> None:
    """Its norm is that of tau K p - tau over all outcomes, p being the noise told, from temperature 20 to 2."""
    told = torch.tensor([0.5, -0.2, 1.0, 0.3, -0.7])
    norms = score_norms(Constant((2, 3), told), np.array([[0, 2], [1, 0]]), torch.device("cpu"))
    score = torch.cat([2 * told[:2].softmax(0), 3 * told[2:].softmax(0)]) - 1
    assert norms == pytest.approx(np.tile(np.geomspace(20, 2, 20) * score.norm().item(), (2, 1)), rel=1e-5)


def test_outcomes_of_one_variable_sum_to_one() -> None:
    """Each variable is normalised by itself."""
    network = GnsmNetwork((2, 3), 8, 1)
    sums = network.normalized(torch.randn(4, 5)).exp()
    assert torch.allclose(torch.stack([sums[:, :2].sum(1), sums[:, 2:].sum(1)]), torch.ones(2, 4))


def test_the_defaults_of_training_are_its_own() -> None:
    """A table that gives one option leaves the others as the detector has them."""
    options = Gnsm.model_validate({"training": {"max_epochs": 3}}).training
    assert (options.learning_rate, options.held_out_fraction) == (1e-3, 0.3)
    assert isinstance(options, TrainingOptions)


@pytest.mark.slow
def test_made_up_metastases_score_higher_than_made_up_normal_tissue(tmp_path: Path) -> None:
    """By three coarse facts of a tile alone. Better keywords tell more."""
    kinds = ("normal", "metastasis")
    learnt = np.stack([pixels for pixels, _ in synthetic_tiles(1, 96)])
    tested = np.stack([pixels for pixels, _ in synthetic_tiles(2, 64, kinds=kinds)])
    detector = Described(inner=TINY)
    detector.fit(TilesInMemory(learnt), tmp_path, device="cpu")
    scores = detector.load(tmp_path, device="cpu").score(batch_of(tested))[:, 0]
    normal, odd = scores[::2], scores[1::2]
    assert (odd[:, None] > normal).mean() >= 0.8
