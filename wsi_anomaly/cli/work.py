"""The commands that most users need: fit, run, demo."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from wsi_anomaly.cli import parameters as p
from wsi_anomaly.cli.console import session, stdout
from wsi_anomaly.cli.tables import print_metrics, print_slides
from wsi_anomaly.execution import Resources

_DEFAULT_IN_USE = (
    "No --model given: using lymph-node-small, which comes with the package to try the tool on lymph nodes. "
    "For work of your own, teach one: wsi-anomaly fit NORMAL_SLIDES"
)


def fit(
    slides: p.Slides,
    out: p.Out,
    pipeline: p.PipelineName = "autoencoder",
    mpp: p.Mpp = None,
    device: p.Device = p.DEFAULTS.device,
    workers: p.Workers = p.DEFAULTS.workers,
    batch_size: p.BatchSize = p.DEFAULTS.batch_size,
    base_weights: p.BaseWeights = p.DEFAULTS.base_weights,
    image_text_weights: p.ImageTextWeights = p.DEFAULTS.image_text_weights,
    offline: p.Offline = p.DEFAULTS.offline,
    quiet: p.Quiet = False,
    log_file: p.LogFile = None,
) -> None:
    """Learn normal tissue from normal slides and measure what scores are normal.

    A part of the slides is held out for the measuring. An interrupted fit goes on when the same command is run again.
    Tiles and unfinished weights lie in OUT.fit, which may be deleted afterwards.
    """
    from wsi_anomaly.cohort import read_cohort
    from wsi_anomaly.pipeline import fit, load_pipeline

    wanted = load_pipeline(pipeline)
    cohort = read_cohort(slides, mpp=mpp, columns=wanted.cohort_columns)
    resources = Resources(
        device=device,
        workers=workers,
        batch_size=batch_size,
        offline=offline,
        base_weights=base_weights,
        image_text_weights=image_text_weights,
    )
    with session(slides=len(cohort), quiet=quiet, log_file=log_file) as bars:
        _, failed = fit(cohort, wanted, out, resources=resources, listener=bars)
    if not quiet:
        stdout.print(f"The model is in {out}. Next: wsi-anomaly run SLIDES --model {out}", markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def run(
    slides: p.Slides,
    model: p.AnyModel = None,
    out: p.Out = Path("results"),
    mpp: p.Mpp = None,
    z_from: Annotated[
        Literal["model", "cohort"],
        typer.Option(
            help="What z-scores are measured against: the model's held-out normal tissue, or all tiles of these slides "
            "(the paper's protocol; for slides that are mostly normal)."
        ),
    ] = "model",
    keep_maps: p.KeepMaps = None,
    keep_reconstructions: p.KeepReconstructions = None,
    device: p.Device = p.DEFAULTS.device,
    workers: p.Workers = p.DEFAULTS.workers,
    batch_size: p.BatchSize = p.DEFAULTS.batch_size,
    base_weights: p.BaseWeights = p.DEFAULTS.base_weights,
    image_text_weights: p.ImageTextWeights = p.DEFAULTS.image_text_weights,
    offline: p.Offline = p.DEFAULTS.offline,
    quiet: p.Quiet = False,
    log_file: p.LogFile = None,
) -> None:
    """Find what is not normal on slides: heat maps, slide scores, QuPath overlays.

    Does only what is missing or out of date. A slide that cannot be used is listed in slides.csv with its reason; the
    others go on, and the exit status is 1.
    """
    from wsi_anomaly.cohort import read_cohort
    from wsi_anomaly.pipeline import pipeline_of, run
    from wsi_anomaly.shipped import model_place
    from wsi_anomaly.storage.model import read_model

    fitted = read_model(model_place(model))
    pipeline = pipeline_of(fitted).keeping(maps=keep_maps, reconstructions=keep_reconstructions)
    cohort = read_cohort(slides, mpp=mpp, columns=pipeline.cohort_columns)
    if model is None and not quiet:
        stdout.print(_DEFAULT_IN_USE, markup=False, soft_wrap=True)
    resources = Resources(
        device=device,
        workers=workers,
        batch_size=batch_size,
        offline=offline,
        base_weights=base_weights,
        image_text_weights=image_text_weights,
    )
    with session(slides=len(cohort), quiet=quiet, log_file=log_file) as bars:
        summary = run(cohort, fitted, out, resources=resources, listener=bars, z_from=z_from, pipeline=pipeline)
    if not quiet:
        print_slides(summary.rows, out)
    if summary.failed:
        raise typer.Exit(1)


def demo(
    out: p.Out = Path("wsi-anomaly-demo"),
    device: p.Device = p.DEFAULTS.device,
    workers: p.Workers = p.DEFAULTS.workers,
    quiet: p.Quiet = False,
    log_file: p.LogFile = None,
) -> None:
    """See all of it at once: make three slides, run the model that comes with the package, evaluate.

    Prompts, reconstructions and heat maps lie in OUT/results/slides. No data, no GPU, a few minutes.
    """
    from wsi_anomaly.pipeline.demonstration import demonstrate

    resources = Resources(device=device, workers=workers)
    with session(slides=0, quiet=quiet, log_file=log_file) as bars:
        found = demonstrate(out, resources=resources, listener=bars)
    print_slides(found.summary.rows, found.summary.folder.root)
    print_metrics(found.evaluation)
    _say_where_to_look(found)


def _say_where_to_look(found: Any) -> None:  # noqa: ANN401 - its module is heavy and imported late
    folder = found.most_abnormal
    for line in (
        f"The most abnormal slide is {folder.slide_id}. Look at its heat map: {folder.heatmap_picture}",
        f"what its tiles were described as: {folder.prompt_picture}",
        f"and what was rebuilt of them under these prompts: {folder.score_picture}",
        f"In QuPath, open {found.slide}",
        f"and drag onto it what was found, {folder.regions}",
        f"and what was planted, {found.truth}",
    ):
        stdout.print(line, markup=False, highlight=False, soft_wrap=True)
