"""The application: its commands, and what a user sees when something goes wrong.

Heavy libraries are imported inside the commands that need them, so that `--help` answers at once.
"""

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from typer.core import TyperCommand

from wsi_anomaly.cli import comparison, evaluation, exploration, inspection, stage_commands, work
from wsi_anomaly.cli.console import stderr
from wsi_anomaly.errors import WsiAnomalyError

app = typer.Typer(
    name="wsi-anomaly",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find what is not normal in whole-slide images, without a single annotation.",
    epilog="For research. Not a medical device; not for diagnosis.",
)

_PANELS = {
    "From slides to findings": (
        work.fit,
        work.run,
        comparison.compare,
        evaluation.evaluate,
        exploration.explore,
        work.demo,
    ),
    "One stage alone": (
        stage_commands.mask,
        stage_commands.tile,
        stage_commands.prompt,
        stage_commands.score,
        stage_commands.calibrate,
        stage_commands.heatmap,
        stage_commands.export,
    ),
    "Look around": (
        inspection.detectors,
        inspection.pipelines,
        inspection.keywords,
        inspection.doctor,
        inspection.validate_geojson,
    ),
}
_CLASSES: dict[Callable[..., None], type[TyperCommand]] = {comparison.compare: comparison.ModelsCommand}
for panel, commands in _PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel, cls=_CLASSES.get(command))(command)


@app.callback(invoke_without_command=True)
def root(*, version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Find what is not normal in whole-slide images, without a single annotation."""
    if version:
        from wsi_anomaly import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line. Exit status 1 for what a user can mend, 2 for wrong usage, 130 when interrupted."""
    try:
        app()
    except WsiAnomalyError as error:
        stderr.print(f"[bold red]Error:[/] {_escaped(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        stderr.print("Interrupted. What is finished is kept; run the same command again to go on.")
        sys.exit(130)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
