"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wsi_anomaly.execution import Resources

DEFAULTS = Resources()

Slides = Annotated[
    list[Path],
    typer.Argument(
        metavar="SLIDES...",
        help="A folder (searched recursively), slide files, or a CSV with the columns "
        "slide_id, path, mpp, split, annotation, mask (only path is needed).",
        show_default=False,
    ),
]
Results = Annotated[Path, typer.Argument(metavar="RESULTS", help="The folder that 'run' or 'tile' wrote.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write to; what is finished there is kept.")]
ModelPath = Annotated[Path, typer.Option("--model", "-m", help="A model folder that 'fit' made.", show_default=False)]
AnyModel = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        help="A model folder that 'fit' made. Without: the small lymph-node model that comes with the package.",
        show_default=False,
    ),
]
PipelineName = Annotated[
    str, typer.Option("--pipeline", "-p", help="A preset of 'wsi-anomaly pipelines', or the path of a pipeline file.")
]
Mpp = Annotated[
    float | None,
    typer.Option("--mpp", help="Microns per pixel of slides that do not tell it themselves.", show_default=False),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA where there is a device.")]
Workers = Annotated[int, typer.Option(min=0, help="Threads and processes that read slides; 0: one for each core.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Tiles scored at once. Does not change the scores.")]
Offline = Annotated[
    bool, typer.Option("--offline", help="Ask the network for nothing, not even for weights that are missing.")
]
ImageTextWeights = Annotated[
    str,
    typer.Option(
        help="Where the image-text model's weights lie on this machine, instead of where the pipeline says.",
        show_default=False,
    ),
]
KeepMaps = Annotated[
    Literal["none", "all"] | None,
    typer.Option(help="Keep the per-pixel anomaly of tiles, whatever the model's pipeline says.", show_default=False),
]
KeepReconstructions = Annotated[
    str | None,
    typer.Option(
        metavar="none|all|worst:N",
        help="Keep tiles as the model rebuilds them: all, or the N worst a slide, whatever the model's pipeline says.",
        show_default=False,
    ),
]
BaseWeights = Annotated[
    str,
    typer.Option(
        help="Where the base model (Stable Diffusion) lies on this machine, instead of where the pipeline says.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
LogFile = Annotated[
    Path | None, typer.Option(help="Write everything that happens to this file too, as JSON lines.", show_default=False)
]
