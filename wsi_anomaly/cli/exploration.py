"""The command explore."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wsi_anomaly.cli import parameters as p
from wsi_anomaly.cli.console import session, stdout

Of = Annotated[
    Literal["scores", "embeddings"] | None,
    typer.Option(
        "--of",
        help="What tells tiles apart: the detector's score vectors (its scores where it has none), or the embeddings "
        "of 'prompt'. Without: embeddings where there are some.",
        show_default=False,
    ),
]
Rows = Annotated[
    int | None, typer.Option(min=2, max=60, help="Of the map. Without: by the number of tiles.", show_default=False)
]
Columns = Annotated[
    int | None, typer.Option(min=2, max=60, help="Of the map. Without: by the number of tiles.", show_default=False)
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="A CSV with the columns slide_id and label, any text such as normal or site A: hits are then counted by "
        "label, of which there may be 8. Without: by z below and above the threshold.",
        show_default=False,
    ),
]
MostTiles = Annotated[
    int | None,
    typer.Option(
        min=50,
        help="Tiles that the map is fitted to, taken evenly from the slides. Without: 10000.",
        show_default=False,
    ),
]


def explore(
    results: p.Results,
    of: Of = None,
    rows: Rows = None,
    columns: Columns = None,
    labels: Labels = None,
    most_tiles: MostTiles = None,
    quiet: p.Quiet = False,
    log_file: p.LogFile = None,
) -> None:
    """Map which kinds of tissue there are, how far each deviates, and what it looks like.

    Writes RESULTS/typicality.png, typicality.csv (one row a cell of the map) and typicality.zarr (the map itself).
    """
    from wsi_anomaly.pipeline.exploring import ExploreOptions, explore
    from wsi_anomaly.storage.layout import RunFolder

    given = {"of": of, "rows": rows, "columns": columns, "most_tiles": most_tiles}
    options = ExploreOptions(**{name: value for name, value in given.items() if value is not None})
    run = RunFolder(results)
    with session(slides=0, quiet=quiet, log_file=log_file):
        found = explore(run, options, labels=labels)
    down, across = found.shape
    for line in (
        f"{found.tiles:,} tiles of {found.slides} slides by {found.features}, on a map of {down} x {across} cells",
        f"The picture is {run.typicality_picture}, the table {run.typicality_table}",
    ):
        stdout.print(line, markup=False, highlight=False, soft_wrap=True)
