"""From slides to heat maps with the stage `prompt` between, and what a model with prompts takes along."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wsi_anomaly.cohort import read_cohort
from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.errors import MissingOutputError, ModelError
from wsi_anomaly.execution import Resources
from wsi_anomaly.pipeline import fit, load_pipeline, run
from wsi_anomaly.pipeline.prompting import build_prompter, prompt
from wsi_anomaly.stages.fit import Part, TrainingTiles
from wsi_anomaly.stages.prompt import PromptOptions
from wsi_anomaly.stages.score import FittedDetector, ScoreOptions, score_slide
from wsi_anomaly.storage.arrays import read_attributes
from wsi_anomaly.storage.layout import ModelFolder, RunFolder, SlideFolder
from wsi_anomaly.storage.model import Model, read_model
from wsi_anomaly.storage.prompts import PromptStore
from wsi_anomaly.synthetic import write_slide

PIPELINE = """
name = "prompted"
[tiles]
tile_px = 64
stride_px = 64
[prompt]
keywords = "{keywords}"
[prompt.model]
name = "conch"
weights = "{weights}"
[detector]
name = "autoencoder"
channels = [8, 8]
[detector.training]
max_epochs = 1
"""
RESOURCES = Resources(device="cpu", workers=1, offline=True)
KEYWORDS = ["germinal center", "capsule", "lymphocytes, small", 'HER2+ (3+) "strong"', "blood vessel", "medulla"]


def ignore(_: object) -> None:
    """Progress."""


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one slide."""
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "node.tif", seed=1, size_px=(1024, 1024))
    return folder


@pytest.fixture
def model(slides: Path, small_conch: Path, tmp_path: Path) -> Model:
    """Fitted with a keyword list of the user's, which lies beside the pipeline file."""
    entries = "".join(f'  {{ text = {json.dumps(text)}, category = "cell" }},\n' for text in KEYWORDS)
    (tmp_path / "mine.toml").write_text(f'organ = "node"\nsource = "me"\nnote = "none"\nnormal = [\n{entries}]\n')
    (tmp_path / "pipeline.toml").write_text(PIPELINE.format(keywords="mine.toml", weights=small_conch))
    pipeline = load_pipeline(tmp_path / "pipeline.toml")
    fitted, failed = fit(read_cohort([slides]), pipeline, tmp_path / "model", resources=RESOURCES, listener=ignore)
    assert not failed
    return fitted


def test_a_model_takes_keywords_and_the_name_of_its_image_text_model_along(
    model: Model, small_conch: Path, slides: Path, tmp_path: Path
) -> None:
    """It may be moved: `run` finds the list in it, and redoes nothing the second time."""
    moved = model.folder.root.rename(tmp_path / "elsewhere")
    (tmp_path / "mine.toml").unlink()
    manifest = json.loads(ModelFolder(moved).manifest.read_text())
    assert manifest["image_text_model"]["name"] == "conch"
    assert "Prompts: 5 of 6 keywords" in ModelFolder(moved).card.read_text()
    out = RunFolder(tmp_path / "results")
    for _ in range(2):
        summary = run(read_cohort([slides]), read_model(moved), out.root, resources=RESOURCES, listener=ignore)
        assert not summary.failed
        written = out.slide("node").prompts.stat().st_mtime_ns
    assert out.slide("node").prompts.stat().st_mtime_ns == written
    table = out.keyword_table.read_text().splitlines()
    assert table[0] == "keyword,category,group,tiles,of_tiles,share"
    assert len(table) == 1 + 2 * len(KEYWORDS)
    assert {row.rsplit(",", 4)[1] for row in table[1:]} == {"train", "test"}
    assert out.keyword_chart.exists()
    assert load_pipeline(out.pipeline).prompt is not None
    assert PromptStore(out.slide("node").prompts).keywords == tuple(KEYWORDS)
    assert str(small_conch) in out.pipeline.read_text()


def test_weights_other_than_those_of_the_fit_are_refused(model: Model, slides: Path, tmp_path: Path) -> None:
    """Another model would choose other words. Nothing is tiled before that is found out."""
    from wsi_anomaly.prompts.conch_network import ConchSizes
    from wsi_anomaly.prompts.conch_random import write_random_conch

    sizes = ConchSizes(
        embedding=8, image_px=16, image_width=8, image_layers=1, image_heads=1, pooler_heads=1,
        text_width=8, text_layers=1, text_heads=1, vocabulary=300, context=16,
    )  # fmt: skip
    write_random_conch(tmp_path / "other", sizes, texts=["x"])
    resources = Resources(device="cpu", workers=1, image_text_weights=str(tmp_path / "other"))
    with pytest.raises(ModelError, match=r"not those that the model was fitted with.*--image-text-weights"):
        run(read_cohort([slides]), model, tmp_path / "results", resources=resources, listener=ignore)
    assert not (tmp_path / "results").exists()


def test_the_same_weights_may_lie_elsewhere(model: Model, small_conch: Path, slides: Path, tmp_path: Path) -> None:
    """Only their content counts."""
    (tmp_path / "place").symlink_to(small_conch)
    resources = Resources(device="cpu", workers=1, image_text_weights=str(tmp_path / "place"))
    assert not run(read_cohort([slides]), model, tmp_path / "results", resources=resources, listener=ignore).failed


class Recorder:
    """A scorer that keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[TileBatch] = []

    def score(self, batch: TileBatch) -> np.ndarray:
        """The similarity with the first keyword, 0 without prompts."""
        self.batches.append(batch)
        known = batch.keyword_scores
        return np.zeros((len(batch), 1), np.float32) if known is None else known[:, :1]


def fitted_with(recorder: Recorder, tile_px: int = 32) -> FittedDetector:
    """As if it came from a model."""
    return FittedDetector("recorder", "digest", tile_px, 0.5, lambda: (recorder, ("similarity",)))


def described(folder: SlideFolder, small_conch: Path) -> PromptStore:
    """After the stage `prompt`."""
    options = PromptOptions(templates=False, model={"name": "conch", "weights": str(small_conch)})
    prompt(folder, build_prompter(options, RESOURCES), RESOURCES)
    return PromptStore(folder.prompts)


def test_a_detector_sees_the_prompt_of_each_tile(write_tiles: Callable[..., SlideFolder], small_conch: Path) -> None:
    """In fragments, with embeddings and similarities, for readable tiles only."""
    folder = write_tiles(9, corrupt=(4,))
    store = described(folder, small_conch)
    recorder = Recorder()
    score_slide(folder, fitted_with(recorder), ScoreOptions(), seed=0, batch_size=6, prompted=True)
    kept = np.delete(np.arange(9), 4)
    assert tuple(prompt for batch in recorder.batches for prompt in batch.prompts) == store.prompts(kept)
    np.testing.assert_array_equal(
        np.concatenate([batch.embeddings for batch in recorder.batches]), store.embedding(kept)
    )
    first, *_ = recorder.batches[0].prompts
    assert first[0] == ("a histopathological photograph of", 1.0)
    assert first[1][0] in store.keywords


def test_a_detector_learns_with_the_prompts_of_its_tiles(
    write_tiles: Callable[..., SlideFolder], small_conch: Path
) -> None:
    """Whatever the order and the slide that they come from."""
    folders = [write_tiles(7, slide_id="a", corrupt=(1,)), write_tiles(5, slide_id="b", seed=1)]
    stores = [described(folder, small_conch) for folder in folders]
    source = TrainingTiles(
        [Part(f, np.ones(n, bool)) for f, n in zip(folders, (7, 5), strict=True)], seed=0, prompted=True
    )
    batch = source.read(np.array([10, 0, 1]))
    assert batch.prompts == (*stores[1].prompts(np.array([4])), *stores[0].prompts(np.array([0, 2])))
    np.testing.assert_array_equal(batch.embeddings[1:], stores[0].embedding(np.array([0, 2])))
    np.testing.assert_array_equal(batch.keyword_scores[:1], stores[1].similarity(np.array([4])))


def test_changed_prompts_make_scores_stale(write_tiles: Callable[..., SlideFolder], small_conch: Path) -> None:
    """And without the stage the message names its command."""
    folder = write_tiles(4)
    with pytest.raises(MissingOutputError, match="wsi-anomaly prompt"):
        score_slide(folder, fitted_with(Recorder()), ScoreOptions(), seed=0, batch_size=6, prompted=True)
    described(folder, small_conch)
    first = score_slide(folder, fitted_with(Recorder()), ScoreOptions(), seed=0, batch_size=6, prompted=True)
    options = PromptOptions(templates=False, top_k=3, model={"name": "conch", "weights": str(small_conch)})
    prompt(folder, build_prompter(options, RESOURCES), RESOURCES)
    second = score_slide(folder, fitted_with(Recorder()), ScoreOptions(), seed=0, batch_size=6, prompted=True)
    assert first.digest != second.digest


def test_latent_diffusion_goes_the_whole_way(
    slides: Path, small_conch: Path, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tiles, prompts, adapter, scores, heat map, overlay, explanation; the base may move, and nothing is done twice."""
    from wsi_anomaly.pipeline.explaining import explain_scores
    from wsi_anomaly.pipeline.running import fitted_detector, pipeline_of

    (tmp_path / "pipeline.toml").write_text(
        PIPELINE.format(keywords="lymph_node", weights=small_conch).replace(
            'name = "autoencoder"\nchannels = [8, 8]\n[detector.training]\nmax_epochs = 1',
            f'name = "anopilad"\nbase = "{tiny_base}"\ntimesteps = [236, 674]\nscores = ["mse_latent", "mse_pixel"]\n'
            '[detector.sampler]\nname = "unipc"\nsteps = 3\n[detector.training]\nsteps = 2\nbatch_size = 4\n'
            '[heatmap]\nscores = ["mse_latent t236", "mse_latent t674"]',
        )
    )
    pipeline = load_pipeline(tmp_path / "pipeline.toml")
    with caplog.at_level("INFO"):
        model, failed = fit(read_cohort([slides]), pipeline, tmp_path / "model", resources=RESOURCES, listener=ignore)
    assert not failed
    assert "steps/s" in caplog.text
    (tmp_path / "elsewhere").symlink_to(tiny_base)
    resources = Resources(device="cpu", workers=1, offline=True, base_weights=str(tmp_path / "elsewhere"))
    chosen = pipeline_of(model).keeping(maps="none", reconstructions="worst:3")
    out = tmp_path / "results"
    for _ in range(2):
        run(read_cohort([slides]), model, out, resources=resources, listener=ignore, pipeline=chosen)
        folder = RunFolder(out).slide("node")
        written = folder.scores.stat().st_mtime_ns
    assert folder.scores.stat().st_mtime_ns == written
    attributes = read_attributes(folder.scores)
    assert attributes["score_names"] == ["mse_latent t236", "mse_pixel t236", "mse_latent t674", "mse_pixel t674"]
    assert attributes["network_calls"] == [3, 3]
    assert folder.heatmap_picture.exists()
    assert json.loads((out / "run.json").read_text())["versions"]["diffusers"]
    picture = explain_scores(folder, fitted_detector(model, chosen, resources), model.reference, chosen)
    assert picture.stat().st_size > 100_000
