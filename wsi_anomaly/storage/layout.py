"""Where everything lies: every path of a run folder and a model folder is named here, once."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SlideFolder:
    """What the stages leave of one slide."""

    root: Path

    @property
    def slide_id(self) -> str:
        """The slide's name in the cohort."""
        return self.root.name

    @property
    def cohort_values(self) -> Path:
        """What the cohort's table says of the slide, where a detector looks at that."""
        return self.root / "cohort.json"

    @property
    def tissue(self) -> Path:
        """Overview picture and tissue mask, by the stage `mask`."""
        return self.root / "tissue.zarr"

    @property
    def overview(self) -> Path:
        """Picture of tissue mask and tile grid, by the stage `tile`."""
        return self.root / "overview.png"

    @property
    def tiles(self) -> Path:
        """Pixels and places of the tiles, by the stage `tile`."""
        return self.root / "tiles.zarr"

    @property
    def prompts(self) -> Path:
        """Embeddings, keyword similarities and prompts of the tiles, by the stage `prompt`."""
        return self.root / "prompts.zarr"

    @property
    def prompt_picture(self) -> Path:
        """A dozen tiles with their keywords, by `prompt --explain`."""
        return self.root / "prompts.png"

    @property
    def scores(self) -> Path:
        """Scores of the tiles, by the stage `score`."""
        return self.root / "scores.zarr"

    @property
    def score_picture(self) -> Path:
        """The tiles of highest and of median z beside their reconstructions, by `score --explain`."""
        return self.root / "scores.png"

    @property
    def heatmap(self) -> Path:
        """z-scores on the grid, by the stage `heatmap`."""
        return self.root / "heatmap.zarr"

    @property
    def heatmap_picture(self) -> Path:
        """The z-scores over the overview, by the stage `heatmap`."""
        return self.root / "heatmap.png"

    @property
    def tile_table(self) -> Path:
        """One row a tile, by the stage `export`."""
        return self.root / f"{self.slide_id}.tiles.csv"

    @property
    def regions(self) -> Path:
        """Outlines of what is over the threshold, by the stage `export`; absent where nothing is."""
        return self.root / f"{self.slide_id}.regions.geojson"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What a run leaves."""

    root: Path

    @property
    def run(self) -> Path:
        """Versions, options, command, host, dates."""
        return self.root / "run.json"

    @property
    def pipeline(self) -> Path:
        """The pipeline with every default written out."""
        return self.root / "pipeline.toml"

    @property
    def slide_table(self) -> Path:
        """One row a slide: status, reason, measures."""
        return self.root / "slides.csv"

    @property
    def reference(self) -> Path:
        """Statistics of scores: of the reference slides in `fit`, of the test slides with `--z-from cohort`."""
        return self.root / "reference.json"

    @property
    def keywords(self) -> Path:
        """The keyword list of the pipeline, where it has one."""
        return self.root / "keywords.toml"

    @property
    def keyword_table(self) -> Path:
        """How many tiles have each keyword in their prompt."""
        return self.root / "keyword_frequency.csv"

    @property
    def keyword_chart(self) -> Path:
        """The same as a picture."""
        return self.root / "keyword_frequency.png"

    @property
    def detector(self) -> Path:
        """The fitted detector, by the stage `fit`."""
        return self.root / "detector"

    @property
    def split(self) -> Path:
        """Which tiles were learnt from and which were held out, by the stage `fit`."""
        return self.root / "split.json"

    @property
    def metrics(self) -> Path:
        """How well the findings agree with labels and annotations, by `evaluate`."""
        return self.root / "metrics.json"

    @property
    def evaluation(self) -> Path:
        """Tables, curves and figures, by `evaluate`."""
        return self.root / "evaluation"

    @property
    def typicality_picture(self) -> Path:
        """The kinds of tissue of all slides on one map, by `explore`."""
        return self.root / "typicality.png"

    @property
    def typicality_table(self) -> Path:
        """One row a cell of that map."""
        return self.root / "typicality.csv"

    @property
    def typicality_map(self) -> Path:
        """The map itself: its prototypes, and how vectors are standardised."""
        return self.root / "typicality.zarr"

    @property
    def importer(self) -> Path:
        """The QuPath script that imports every slide's GeoJSON."""
        return self.root / "import_wsi_anomaly.groovy"

    @property
    def lock(self) -> Path:
        """Held by the process that writes the files above."""
        return self.root / "run.lock"

    def slide(self, slide_id: str) -> SlideFolder:
        """The folder of one slide."""
        return SlideFolder(self.root / "slides" / slide_id)

    def slides(self) -> Iterator[SlideFolder]:
        """The folders of all slides that some stage has worked on, by name."""
        parent = self.root / "slides"
        if parent.is_dir():
            yield from (SlideFolder(path) for path in sorted(parent.iterdir()) if path.is_dir())


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model: everything that changes results, in one folder that travels."""

    root: Path

    @property
    def pipeline(self) -> Path:
        """The pipeline that it was fitted with and that `run` takes its options from."""
        return self.root / "pipeline.toml"

    @property
    def keywords(self) -> Path:
        """The keyword list that it was fitted with, where it has one."""
        return self.root / "keywords.toml"

    @property
    def keyword_table(self) -> Path:
        """How many training tiles have each keyword in their prompt."""
        return self.root / "keyword_frequency.csv"

    @property
    def detector(self) -> Path:
        """The detector's weights (safetensors) and training history."""
        return self.root / "detector"

    @property
    def reference(self) -> Path:
        """Mean, deviation and quantiles of the scores of normal tissue not used to fit."""
        return self.root / "reference.json"

    @property
    def card(self) -> Path:
        """What it learnt from, for people."""
        return self.root / "card.md"

    @property
    def manifest(self) -> Path:
        """The sha256 of every other file."""
        return self.root / "manifest.json"

    @property
    def workshop(self) -> RunFolder:
        """Where `fit` keeps tiles and unfinished weights; may be deleted once the model is there."""
        return RunFolder(self.root.with_name(f"{self.root.name}.fit"))
