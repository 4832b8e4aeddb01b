"""How much of the image-text model's own speed the stage `prompt` keeps.

    python benchmarks/prompting.py [--size v1|small] [--tiles N] [--batch-size N] [--repeats N] [--device cpu|cuda]

Beside the stage (reading, resizing, embedding, matching, writing) runs the bare forward pass of the same model over
images that are already resized, in the same chunks, alternately in one process. Goal on a CPU: 0.9 of the bare pass.
The model is of CONCH's class with random weights: `v1` has the sizes of CONCH, `small` those of a ViT-Ti at 224 px.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from wsi_anomaly.execution import Resources
from wsi_anomaly.pipeline.prompting import build_prompter, prompt
from wsi_anomaly.stages.prompt import Prompter, PromptOptions
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.tiles import TileStore
from wsi_anomaly.synthetic import write_slide

SMALL = {
    "embedding": 192,
    "image_px": 224,
    "image_width": 192,
    "image_heads": 3,
    "pooler_heads": 2,
    "text_width": 192,
    "text_layers": 2,
    "text_heads": 3,
}


def main() -> None:
    """Print tiles per second of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("v1", "small"), default="small")
    parser.add_argument("--tiles", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        compare(Path(scratch), arguments)


def compare(scratch: Path, arguments: argparse.Namespace) -> None:
    """Both in turn, on the same tiles."""
    folder = tiles_of_a_slide(scratch, arguments.tiles)
    resources = Resources(device=arguments.device, batch_size=arguments.batch_size)
    prompter = random_prompter(scratch / "conch", arguments.size, resources)
    count = len(TileStore(folder.tiles))
    times = [
        (of_the_stage(folder, prompter, resources), of_the_bare_pass(folder, prompter, arguments.batch_size))
        for _ in range(arguments.repeats)
    ]
    table = Table("model", "tiles", "batch", "stage, tiles/s", "bare forward pass, tiles/s", "ratio")
    stage, bare = (count / median(column) for column in zip(*times, strict=True))
    ratio = median(forward / whole for whole, forward in times)
    table.add_row(arguments.size, str(count), str(arguments.batch_size), f"{stage:.2f}", f"{bare:.2f}", f"{ratio:.2f}")
    Console().print(table)


def tiles_of_a_slide(scratch: Path, at_least: int) -> SlideFolder:
    """The tiles of a made-up slide of tissue throughout."""
    from wsi_anomaly.cohort import CohortSlide
    from wsi_anomaly.imaging.tissue import TissueOptions
    from wsi_anomaly.stages.mask import mask_slide
    from wsi_anomaly.stages.tile import TileOptions, tile_slide

    side_px = 256 * int(np.ceil(np.sqrt(1.6 * at_least)))
    write_slide(scratch / "slide.tif", seed=0, size_px=(side_px, side_px))
    slide, folder = CohortSlide("slide", scratch / "slide.tif"), SlideFolder(scratch / "slides" / "slide")
    mask_slide(slide, folder, TissueOptions())
    tile_slide(slide, folder, TileOptions(), threads=2)
    return folder


def random_prompter(folder: Path, size: str, resources: Resources) -> Prompter:
    """Loaded, with the vectors of the keywords at hand: they are computed once a model, not once a slide."""
    from wsi_anomaly.plugins import IMAGE_TEXT_MODELS, load_plugin

    load_plugin(IMAGE_TEXT_MODELS, "conch")
    from wsi_anomaly.prompts.conch_network import ConchSizes
    from wsi_anomaly.prompts.conch_random import write_random_conch

    sizes = ConchSizes() if size == "v1" else ConchSizes.model_validate(SMALL)
    write_random_conch(folder, sizes, texts=["lymphocytes and plasma cells of the medullary cords"])
    options = PromptOptions(templates=False, model={"name": "conch", "weights": str(folder)})
    prompter = build_prompter(options, resources)
    prompter.load()
    return prompter


def of_the_stage(folder: SlideFolder, prompter: Prompter, resources: Resources) -> float:
    """Seconds."""
    shutil.rmtree(folder.prompts, ignore_errors=True)
    started = time.perf_counter()
    prompt(folder, prompter, resources)
    return time.perf_counter() - started


def of_the_bare_pass(folder: SlideFolder, prompter: Prompter, batch_size: int) -> float:
    """Seconds, without reading and resizing."""
    embedder, _ = prompter.load()
    store = TileStore(folder.tiles)
    prepared = embedder.prepare(store.read(np.arange(len(store))))
    started = time.perf_counter()
    for start in range(0, len(prepared), batch_size):
        embedder.embed_tiles(prepared[start : start + batch_size])
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
