"""The command compare."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from wsi_anomaly.cli import parameters as p
from wsi_anomaly.cli.console import session, stdout
from wsi_anomaly.cli.evaluation import Annotations, Labels, evaluate
from wsi_anomaly.cli.tables import print_slides
from wsi_anomaly.execution import Resources

_MODELS = ("--models", "-m")

Models = Annotated[
    list[Path],
    typer.Option(
        *_MODELS,
        metavar="MODEL...",
        help="Model folders that 'fit' made, or names of models that come with the package: all up to the next option, "
        "or one each time.",
        show_default=False,
    ),
]


class ModelsCommand(TyperCommand):
    """A command whose option --models takes several values, which click knows of arguments only."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - some versions of typer bring a click of their own
        """As click does, after `--models a b` has become `--models a --models b`."""
        try:
            return super().parse_args(ctx, list(_one_each(args)))
        except Exception as error:
            # What --models took cannot be told from slides; click's own word would be that there are none.
            if getattr(getattr(error, "param", None), "name", "") == "slides" and hasattr(error, "message"):
                error.message = "They come before --models, or after two dashes: --models A B -- SLIDES"
            raise


def compare(
    slides: p.Slides,
    models: Models,
    out: p.Out = Path("comparison"),
    annotations: Annotations = None,
    labels: Labels = None,
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
    """Run several models on the same slides, reading each tile once for all of them: OUT/<model>, each as of 'run'.

    The models must have been fitted with the same tiles and tissue options; all of them are in memory at the same time.
    With --annotations or --labels the results are evaluated at the end, as by 'evaluate OUT/A OUT/B' with its defaults.
    """
    from wsi_anomaly.cohort import read_cohort
    from wsi_anomaly.pipeline import pipeline_of
    from wsi_anomaly.pipeline.comparing import compare
    from wsi_anomaly.shipped import model_place
    from wsi_anomaly.storage.model import read_model

    fitted = [read_model(model_place(model)) for model in models]
    columns = dict.fromkeys(chain.from_iterable(pipeline_of(model).cohort_columns for model in fitted))
    cohort = read_cohort(slides, mpp=mpp, columns=tuple(columns))
    resources = Resources(
        device=device,
        workers=workers,
        batch_size=batch_size,
        offline=offline,
        base_weights=base_weights,
        image_text_weights=image_text_weights,
    )
    with session(slides=len(cohort), quiet=quiet, log_file=log_file) as bars:
        summaries = compare(cohort, fitted, out, resources=resources, listener=bars)
    if not quiet:
        for summary in summaries:
            stdout.print(f"{summary.folder.root.name}:", markup=False, highlight=False, soft_wrap=True)
            print_slides(summary.rows, summary.folder.root)
    mapped = [summary.folder for summary in summaries if len(summary.failed) < len(summary.rows)]
    if mapped and (annotations or labels):
        evaluate([folder.root for folder in mapped], annotations, labels, quiet=quiet, log_file=log_file)
    if any(summary.failed for summary in summaries):
        raise typer.Exit(1)


def _one_each(arguments: Iterable[str]) -> Iterator[str]:
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in _MODELS else ""
            if option:
                continue
        elif option:
            yield option
        yield argument
