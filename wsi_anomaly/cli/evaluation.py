"""The command evaluate."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wsi_anomaly.cli import parameters as p
from wsi_anomaly.cli.console import session, stdout
from wsi_anomaly.cli.tables import print_metrics

Annotations = Annotated[
    Path | None,
    typer.Option(
        help="A folder with <slide_id>.xml (ASAP), .geojson (QuPath) or mask pictures (PNG, TIFF), or a CSV with "
        "the columns slide_id, annotation, label.",
        show_default=False,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="A CSV with the columns slide_id and label (normal, abnormal, macro, micro, itc).", show_default=False
    ),
]
AbnormalFrom = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of a tile inside the annotation from which it counts as abnormal, instead of the protocol's; "
        "1 is fully inside.",
        show_default=False,
    ),
]
NormalUpTo = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share up to which it counts as normal; tiles in between are left out.",
        show_default=False,
    ),
]
Negatives = Annotated[
    Literal["all", "normal-slides"] | None,
    typer.Option(
        help="Which normal tiles count at the tile level: all, or those of normal slides only.",
        show_default=False,
    ),
]
ThresholdZ = Annotated[
    float | None,
    typer.Option(help="z above which tissue counts as found, for Dice, IoU and TNR.", show_default=False),
]
MaskValues = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBERS",
        help="Which numbers in mask pictures mean abnormal, such as 2 or 1,2; of colours 0xRRGGBB.",
        show_default=False,
    ),
]
Group = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=MEANING",
        help="What a group of outlines means that is not known: NAME=abnormal, NAME=excluded or NAME=ignored; "
        "'none' are those without a group, '*' all others. May be given several times.",
    ),
]


def evaluate(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS...", help="Folders that 'run' wrote, one a detector; tables go to the first."),
    ],
    annotations: Annotations = None,
    labels: Labels = None,
    protocol: Annotated[
        Literal["default", "paper", "released"],
        typer.Option(help="The choices of the AnoPILaD paper, or of its released code; each is named in the tables."),
    ] = "default",
    abnormal_from: AbnormalFrom = None,
    normal_up_to: NormalUpTo = None,
    negatives: Negatives = None,
    threshold_z: ThresholdZ = None,
    mask_values: MaskValues = None,
    group: Group = None,
    quiet: p.Quiet = False,
    log_file: p.LogFile = None,
) -> None:
    """Compare what detectors found with a pathologist's outlines and labels: tiles, slides, segmentations, lesions.

    Writes RESULTS/metrics.json, and RESULTS/evaluation with tables (Markdown, LaTeX), curves, histograms and the heat
    maps of all detectors side by side.
    """
    from wsi_anomaly.annotations import parse_groups
    from wsi_anomaly.stages.evaluate import choose_protocol, evaluate
    from wsi_anomaly.storage.layout import RunFolder

    if labels is None and annotations is None:
        raise typer.BadParameter("give --annotations, --labels or both")
    choices = choose_protocol(
        protocol,
        abnormal_from=abnormal_from,
        normal_up_to=normal_up_to,
        negatives=negatives,
        threshold_z=threshold_z,
    )
    with session(slides=0, quiet=quiet, log_file=log_file):
        done = evaluate(
            [RunFolder(folder) for folder in results],
            labels=labels,
            annotations=annotations,
            protocol=choices,
            groups=parse_groups(group or ()),
            mask_values=_whole_numbers(mask_values) if mask_values else None,
        )
    print_metrics(done)
    for name, found in done.findings.items():
        for warning in found.warnings:
            stdout.print(f"{name}: {warning}", markup=False, highlight=False, soft_wrap=True)
    stdout.print(f"Tables and figures are in {done.folder}", markup=False, highlight=False, soft_wrap=True)


def _whole_numbers(text: str) -> frozenset[int]:
    try:
        return frozenset(int(number, 0) for number in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"--mask-values {text}: write whole numbers with commas between, such as 1,2"
        ) from error
