"""The stage `prompt` alone over a run folder, and its picture for the eye of a pathologist."""

from pathlib import Path

from wsi_anomaly.errors import OptionsError
from wsi_anomaly.execution import Listener, Resources
from wsi_anomaly.pipeline.keyword_frequency import frequency_of, read_keyword_frequency, write_keyword_frequency
from wsi_anomaly.pipeline.preset import load_pipeline
from wsi_anomaly.pipeline.prompting import build_prompter, prompt
from wsi_anomaly.pipeline.running import model_prompter, pipeline_of
from wsi_anomaly.pipeline.single import apply_alone, having_slide
from wsi_anomaly.reporting.prompt_pictures import choose_tiles, write_prompt_sheet
from wsi_anomaly.stages.prompt import Prompter, PromptOptions
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.model import Model, read_model
from wsi_anomaly.storage.prompts import PromptStore
from wsi_anomaly.storage.record import find_record, writable
from wsi_anomaly.storage.slide_table import SlideRow
from wsi_anomaly.storage.tiles import TileStore

_TILES_SHOWN = 12


def describe_alone(
    run: RunFolder,
    *,
    pipeline: str | None,
    model: Path | None,
    explain: str | None,
    resources: Resources,
    listener: Listener,
) -> tuple[tuple[SlideRow, ...], Path | None]:
    """Describe all slides of a run folder. The slides that failed, and the picture of the slide to `explain`.

    Raises:
        OptionsError: both a pipeline and a model are given, or one without prompts.
        MissingOutputError: no slide has tiles, or the slide to explain is not there.
    """
    fitted = read_model(model) if model else None
    if explain is not None:
        having_slide(run, "tile", explain)
    prompter = _prompter(fitted, pipeline, resources)
    failed = apply_alone("prompt", "tile", run, lambda slide: prompt(slide, prompter, resources), listener=listener)
    described = [slide for slide in run.slides() if find_record(slide.root, "prompt")]
    trained = read_keyword_frequency(fitted.folder.keyword_table) if fitted else {}
    with writable(run.root):
        write_keyword_frequency(run, prompter.vocabulary, trained | {"test": frequency_of(described)})
    return failed, explain_prompts(run.slide(explain)) if explain is not None else None


def explain_prompts(slide: SlideFolder) -> Path:
    """Draw a dozen tiles that span the variety of a slide, with their keywords, weights and similarities."""
    tiles, prompts = TileStore(slide.tiles), PromptStore(slide.prompts)
    chosen = choose_tiles(prompts.embedding(slice(None)), _TILES_SHOWN)
    attributes = prompts.attributes
    with writable(slide.root):
        write_prompt_sheet(
            slide.prompt_picture,
            tiles.read(chosen),
            [_described(prompts, tile) for tile in chosen.tolist()],
            captions=[caption(tile, *tiles.places.origins[tile].tolist()) for tile in chosen.tolist()],
            slide_id=slide.slide_id,
            tile_mpp=float(tiles.attributes["tile_mpp"]),
            header=f"{attributes['image_text_model']}, {attributes['weighting']} weights, "
            f"{len(prompts.keywords)} keywords",
        )
    return slide.prompt_picture


def _described(prompts: PromptStore, tile: int) -> list[tuple[str, float, float]]:
    """Keyword, weight and similarity, nearest first."""
    (similarity,) = prompts.similarity(slice(tile, tile + 1))
    pairs = zip(prompts.keyword[tile].tolist(), prompts.weight[tile].tolist(), strict=True)
    return [(prompts.keywords[k], weight, float(similarity[k])) for k, weight in pairs if k >= 0]


def _prompter(fitted: Model | None, pipeline: str | None, resources: Resources) -> Prompter:
    if fitted and pipeline:
        raise OptionsError("prompt: give --pipeline or --model, not both")
    if fitted:
        prompter = model_prompter(fitted, pipeline_of(fitted), resources)
        if prompter is None:
            raise OptionsError(f"{fitted.folder.root}: this model was fitted without prompts")
        return prompter
    options = load_pipeline(pipeline).prompt if pipeline else PromptOptions()
    if options is None:
        raise OptionsError(f"pipeline '{pipeline}': it has no table [prompt]")
    return build_prompter(options, resources)


def caption(tile: int, x: int, y: int) -> str:
    """How a tile is named in pictures."""
    return f"tile {tile:,} · x {x:,}, y {y:,}"
