"""The commands that run one stage alone: mask, tile, prompt, score, calibrate, heatmap, export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wsi_anomaly.cli import parameters as p
from wsi_anomaly.cli.console import session, stdout
from wsi_anomaly.execution import Resources
from wsi_anomaly.storage.slide_table import SlideRow


def mask(
    slides: p.Slides,
    out: p.Out,
    pipeline: p.PipelineName = "autoencoder",
    mpp: p.Mpp = None,
    workers: p.Workers = p.DEFAULTS.workers,
    quiet: p.Quiet = False,
    log_file: p.LogFile = None,
) -> None:
    """Find the tissue on slides: OUT/slides/<slide_id>/tissue.zarr."""
    _prepare("mask", slides, out, pipeline=pipeline, mpp=mpp, workers=workers, quiet=quiet, log_file=log_file)


def tile(
    slides: p.Slides,
    out: p.Out,
    pipeline: p.PipelineName = "autoencoder",
    mpp: p.Mpp = None,
    workers: p.Workers = p.DEFAULTS.workers,
    quiet: p.Quiet = False,
    log_file: p.LogFile = None,
) -> None:
    """Read the tissue tile by tile: OUT/slides/<slide_id>/tiles.zarr and overview.png. Needs mask."""
    _prepare("tile", slides, out, pipeline=pipeline, mpp=mpp, workers=workers, quiet=quiet, log_file=log_file)


def prompt(
    results: p.Results,
    pipeline: Annotated[
        str | None,
        typer.Option("--pipeline", "-p", help="Whose \\[prompt] options to use: a preset, or the path of a file."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Describe tiles as they were described for this model.")
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="SLIDE_ID", help="Draw a dozen tiles of this slide with their keywords: prompts.png."),
    ] = None,
    device: p.Device = p.DEFAULTS.device,
    workers: p.Workers = p.DEFAULTS.workers,
    batch_size: p.BatchSize = p.DEFAULTS.batch_size,
    image_text_weights: p.ImageTextWeights = p.DEFAULTS.image_text_weights,
    offline: p.Offline = p.DEFAULTS.offline,
    quiet: p.Quiet = False,
    log_file: p.LogFile = None,
) -> None:
    """Describe tiles by keywords: RESULTS/slides/<slide_id>/prompts.zarr, RESULTS/keyword_frequency.png. Needs tile.

    An image-text model ranks the keywords of a list by how near they are to each tile; the nearest become its prompt.
    Without --pipeline and --model: CONCH, and the keywords of lymph nodes.
    """
    from wsi_anomaly.pipeline.describing import describe_alone
    from wsi_anomaly.pipeline.single import having
    from wsi_anomaly.storage.layout import RunFolder

    run = RunFolder(results)
    resources = Resources(
        device=device,
        workers=workers,
        batch_size=batch_size,
        offline=offline,
        image_text_weights=image_text_weights,
    )
    with session(slides=len(having(run, "tile")), quiet=quiet, log_file=log_file) as bars:
        failed, picture = describe_alone(
            run, pipeline=pipeline, model=model, explain=explain, resources=resources, listener=bars
        )
    if picture and not quiet:
        stdout.print(f"Look at {picture}", markup=False, highlight=False, soft_wrap=True)
    _leave(failed)


def score(
    results: p.Results,
    model: p.ModelPath,
    keep_maps: p.KeepMaps = None,
    keep_reconstructions: p.KeepReconstructions = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="SLIDE_ID", help="Draw the tiles of highest and of median z of this slide: scores.png."),
    ] = None,
    device: p.Device = p.DEFAULTS.device,
    batch_size: p.BatchSize = p.DEFAULTS.batch_size,
    base_weights: p.BaseWeights = p.DEFAULTS.base_weights,
    offline: p.Offline = p.DEFAULTS.offline,
    quiet: p.Quiet = False,
    log_file: p.LogFile = None,
) -> None:
    """Score tiles with a model: RESULTS/slides/<slide_id>/scores.zarr. Needs tile."""
    from wsi_anomaly.pipeline.explaining import explain_scores
    from wsi_anomaly.pipeline.loading import load_for_stage
    from wsi_anomaly.pipeline.running import fitted_detector, pipeline_of
    from wsi_anomaly.pipeline.running import score as score_slide
    from wsi_anomaly.pipeline.single import apply_alone, having, having_slide
    from wsi_anomaly.storage.layout import RunFolder
    from wsi_anomaly.storage.model import read_model

    run, fitted = RunFolder(results), read_model(model)
    pipeline = pipeline_of(fitted).keeping(maps=keep_maps, reconstructions=keep_reconstructions)
    resources = Resources(device=device, batch_size=batch_size, offline=offline, base_weights=base_weights)
    detector = fitted_detector(fitted, pipeline, resources)
    tiled = having(run, "tile")
    with session(slides=len(tiled), quiet=quiet, log_file=log_file) as bars:
        load_for_stage(tiled, detector, pipeline)
        failed = apply_alone(
            "score", "tile", run, lambda slide: score_slide(slide, detector, pipeline, resources), listener=bars
        )
        if explain is not None:
            picture = explain_scores(having_slide(run, "score", explain), detector, fitted.reference, pipeline)
            stdout.print(f"Look at {picture}", markup=False, highlight=False, soft_wrap=True)
    _leave(failed)


def calibrate(
    results: p.Results,
    out: Annotated[Path, typer.Option("--out", "-o", help="The reference file to write.")] = Path("reference.json"),
    quiet: p.Quiet = False,
) -> None:
    """Measure what scores are normal, from slides known to be normal. Needs score.

    'fit' does this by itself; use it to measure against the normal slides of another scanner or laboratory.
    """
    from wsi_anomaly.pipeline.single import having
    from wsi_anomaly.stages.calibrate import Selection
    from wsi_anomaly.stages.calibrate import calibrate as measure
    from wsi_anomaly.storage.layout import RunFolder
    from wsi_anomaly.storage.record import writable
    from wsi_anomaly.storage.reference import write_reference

    slides = having(RunFolder(results), "score")
    reference = measure([Selection(slide) for slide in slides], "held-out normal slides")
    with writable(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_reference(out, reference)
    if not quiet:
        line = f"{out}: what {len(slides)} slides score. Next: wsi-anomaly heatmap {results} --reference {out}"
        stdout.print(line, markup=False, soft_wrap=True)


def heatmap(
    results: p.Results,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Whose reference and options to use.")] = None,
    reference: Annotated[Path | None, typer.Option(help="A file of 'calibrate', instead of the model's own.")] = None,
    z_from: Annotated[
        Literal["model", "cohort"], typer.Option(help="'cohort': measure against all tiles of RESULTS (the paper).")
    ] = "model",
    pipeline: Annotated[
        str | None,
        typer.Option("--pipeline", "-p", help="A pipeline whose \\[heatmap] options to use, not the model's."),
    ] = None,
    quiet: p.Quiet = False,
    log_file: p.LogFile = None,
) -> None:
    """Turn scores into z-scores and heat maps: RESULTS/slides/<slide_id>/heatmap.zarr and heatmap.png. Needs score."""
    from wsi_anomaly.pipeline.references import choose_reference
    from wsi_anomaly.pipeline.single import apply_alone, having
    from wsi_anomaly.stages.heatmap import map_slide
    from wsi_anomaly.storage.layout import RunFolder

    run = RunFolder(results)
    chosen = choose_reference(run, model=model, reference=reference, z_from=z_from, pipeline=pipeline)
    with session(slides=len(having(run, "score")), quiet=quiet, log_file=log_file) as bars:
        failed = apply_alone(
            "heatmap", "score", run, lambda slide: map_slide(slide, chosen.reference, chosen.options), listener=bars
        )
    _leave(failed)


def export(results: p.Results, quiet: p.Quiet = False, log_file: p.LogFile = None) -> None:
    """Write findings for QuPath (GeoJSON) and for spreadsheets (CSV) beside the heat maps. Needs heatmap."""
    from wsi_anomaly.pipeline.single import apply_alone, having
    from wsi_anomaly.stages.export import export_slide, write_importer
    from wsi_anomaly.storage.layout import RunFolder

    run = RunFolder(results)
    with session(slides=len(having(run, "heatmap")), quiet=quiet, log_file=log_file) as bars:
        failed = apply_alone("export", "heatmap", run, export_slide, listener=bars)
    write_importer(run)
    _leave(failed)


def _prepare(
    step: Literal["mask", "tile"],
    slides: list[Path],
    out: Path,
    *,
    pipeline: str,
    mpp: float | None,
    workers: int,
    quiet: bool,
    log_file: Path | None,
) -> None:
    from wsi_anomaly.cohort import read_cohort
    from wsi_anomaly.pipeline import load_pipeline
    from wsi_anomaly.pipeline.single import prepare_alone
    from wsi_anomaly.storage.layout import RunFolder

    wanted = load_pipeline(pipeline)
    cohort = read_cohort(slides, mpp=mpp, columns=wanted.cohort_columns)
    with session(slides=len(cohort), quiet=quiet, log_file=log_file) as bars:
        failed = prepare_alone(
            step,
            cohort,
            RunFolder(out),
            wanted,
            resources=Resources(workers=workers),
            listener=bars,
        )
    _leave(failed)


def _leave(failed: tuple[SlideRow, ...]) -> None:
    """Failures have been printed; the exit status tells scripts."""
    if failed:
        raise typer.Exit(1)
