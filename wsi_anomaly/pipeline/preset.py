"""Pipeline files: TOML tables to a typed `Pipeline`. Presets are found by bare name in the package, or by path."""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from wsi_anomaly.detectors.protocol import Based, Detector
from wsi_anomaly.errors import OptionsError
from wsi_anomaly.execution import Resources
from wsi_anomaly.imaging.tissue import TissueOptions
from wsi_anomaly.options import Options, nearest, parse_options
from wsi_anomaly.plugins import DETECTORS, load_plugin
from wsi_anomaly.prompts.keywords import is_path, load_keywords
from wsi_anomaly.stages.fit import SplitOptions
from wsi_anomaly.stages.heatmap import HeatmapOptions
from wsi_anomaly.stages.prompt import PromptOptions
from wsi_anomaly.stages.score import ScoreOptions
from wsi_anomaly.stages.tile import TileOptions
from wsi_anomaly.storage.layout import ModelFolder, RunFolder
from wsi_anomaly.storage.model import write_toml


class Pipeline(Options):
    """Everything that decides results, stage by stage."""

    name: str
    description: str = ""
    seed: int = Field(0, ge=0)
    """Of everything random: which slides are held out, the noise of a tile, and how a detector learns unless `seed`
    under [detector.training] says otherwise."""
    tissue: TissueOptions = TissueOptions()
    tiles: TileOptions = TileOptions()
    prompt: PromptOptions | None = None
    """Only for detectors that use prompts, embeddings or keyword similarities: the stage is left out without it."""
    split: SplitOptions = SplitOptions()
    detector: dict[str, Any]
    """`name`, an installed detector, and that detector's own options."""
    score: ScoreOptions = ScoreOptions()
    heatmap: HeatmapOptions = HeatmapOptions()

    @property
    def detector_name(self) -> str:
        """The plug-in that is used.

        Raises:
            OptionsError: the table [detector] has no name.
        """
        if "name" not in self.detector:
            raise OptionsError(f"pipeline '{self.name}': [detector] has no name. See: wsi-anomaly detectors")
        return str(self.detector["name"])

    @property
    def cohort_columns(self) -> tuple[str, ...]:
        """Columns of the cohort's table that the detector looks at: its option `columns`, where it has one."""
        columns = self.detector.get("columns", ())
        # What is no list is refused when the detector is built.
        return tuple(map(str, columns)) if isinstance(columns, (list, tuple)) else ()

    def with_defaults(self) -> "Pipeline":
        """The same pipeline with the detector's defaults written out too."""
        detector = build_detector(self)
        options = detector.model_dump(mode="json") if isinstance(detector, Options) else dict(self.detector)
        return self.model_copy(update={"detector": {"name": self.detector_name, **options}})

    def keeping(self, *, maps: Literal["none", "all"] | None = None, reconstructions: str | None = None) -> "Pipeline":
        """The same pipeline with other wishes of what is kept beside the scores; None leaves its own.

        Raises:
            OptionsError: `reconstructions` is neither "none" nor "all" nor, say, "worst:200".
        """
        given = {"keep_maps": maps, "keep_reconstructions": reconstructions}
        table = self.score.model_dump() | {name: wish for name, wish in given.items() if wish is not None}
        kept = parse_options(ScoreOptions, table, where="--keep-reconstructions (none, all, or worst:N)")
        return self.model_copy(update={"score": kept})

    def located(self, folder: Path) -> "Pipeline":
        """The same pipeline, with a relative path of a keyword file taken from `folder`, where its own file lies."""
        if self.prompt is None or not is_path(self.prompt.keywords):
            return self
        prompt = self.prompt.model_copy(update={"keywords": str(folder / self.prompt.keywords)})
        return self.model_copy(update={"prompt": prompt})

    def as_table(self) -> dict[str, Any]:
        """Plain values for a TOML file."""
        return self.model_dump(mode="json")


def load_pipeline(name_or_path: str | Path) -> Pipeline:
    """A preset by bare name ("autoencoder"), or a pipeline file by path.

    Raises:
        OptionsError: there is no such preset or file, it is not TOML, or a key or value is wrong.
    """
    path = _pipeline_path(name_or_path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OptionsError(f"{path}: there is no such file. See: wsi-anomaly pipelines") from error
    except (OSError, ValueError) as error:
        raise OptionsError(f"{path}: is not a TOML file that can be read ({error})") from error
    return parse_options(Pipeline, table, where=path.name).located(path.parent)


def write_pipeline(folder: RunFolder | ModelFolder, pipeline: Pipeline) -> None:
    """Write a pipeline with every default, and beside it the keyword list that it uses: the folder may travel."""
    table = pipeline.as_table()
    if pipeline.prompt is not None:
        write_toml(folder.keywords, load_keywords(pipeline.prompt.keywords).model_dump(mode="json"))
        table["prompt"]["keywords"] = folder.keywords.name
    write_toml(folder.pipeline, table)


def preset_names() -> tuple[str, ...]:
    """The presets that come with the package."""
    return tuple(_presets())


def build_detector(pipeline: Pipeline) -> Detector:
    """The untrained detector of a pipeline.

    Raises:
        UnknownPluginError: it is not installed.
        OptionsError: one of its options is wrong.
    """
    name = pipeline.detector_name
    detector_class = load_plugin(DETECTORS, name)
    given = {key: value for key, value in pipeline.detector.items() if key != "name"}
    options = _seeded(given, detector_class, pipeline.seed)
    detector: Detector = parse_options(detector_class, options, where=f"pipeline '{pipeline.name}', [detector] {name}")
    return detector


def require_ready(pipeline: Pipeline) -> None:
    """Refuse, before slides are tiled, what its detector would refuse when it learns: it knows what it needs.

    Raises:
        OptionsError: the detector needs prompts or embeddings, and the pipeline makes none; or its extra is missing.
    """
    name = pipeline.detector_name
    kind = load_plugin(DETECTORS, name)
    needed = [need for need in getattr(kind, "needs", ()) if need in ("prompts", "embeddings")]
    if needed and pipeline.prompt is None:
        raise OptionsError(
            f"the detector '{name}' needs the {' and '.join(needed)} of tiles, and pipeline '{pipeline.name}' makes "
            'none. Add a table [prompt], such as: [prompt] keywords = "lymph_node", [prompt.model] name = "conch".'
        )
    extra = getattr(kind, "extra", "")
    if extra and find_spec(extra) is None:
        raise OptionsError(
            f"the detector '{name}' needs the Python package '{extra}', which is not installed. "
            f"Install it: pip install 'wsi-anomaly[{extra}]'"
        )


def build_detector_here(pipeline: Pipeline, resources: Resources) -> Detector:
    """The same, with its base model where it lies on this machine.

    Raises:
        OptionsError: a place for a base model is given, and the detector has none.
    """
    detector = build_detector(pipeline)
    if isinstance(detector, Based):
        return detector.on_base(resources.base_weights, offline=resources.offline)
    if resources.base_weights:
        raise OptionsError(f"--base-weights: the detector '{pipeline.detector_name}' has no base model. Leave it out.")
    return detector


def _seeded(options: Mapping[str, Any], kind: type[Options], seed: int) -> dict[str, Any]:
    """The same options with a seed wherever they or their tables take one and none is given."""
    seeded = dict(options)
    if "seed" in kind.model_fields:
        seeded.setdefault("seed", seed)
    for name, field in kind.model_fields.items():
        inner, table = field.annotation, options.get(name, {})
        if isinstance(inner, type) and issubclass(inner, Options) and isinstance(table, Mapping):  # or refused by name
            filled = _seeded(table, inner, seed)
            if filled != table:
                seeded[name] = filled
    return seeded


def _pipeline_path(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml" or len(path.parts) > 1:
        return path
    presets = _presets()
    if str(name_or_path) not in presets:
        raise OptionsError(
            f"there is no pipeline '{name_or_path}' ({nearest(str(name_or_path), list(presets))}). "
            "Give a preset of 'wsi-anomaly pipelines' or the path of a .toml file."
        )
    return presets[str(name_or_path)]


@cache
def _presets() -> dict[str, Path]:
    folder = Path(str(files("wsi_anomaly") / "pipelines"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}
