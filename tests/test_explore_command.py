"""`wsi-anomaly explore`: what it leaves, that it is the same each time, and what a user is told of bad input."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from wsi_anomaly.cli.app import app, main
from wsi_anomaly.imaging.typicality import TypicalityMap, place
from wsi_anomaly.pipeline.exploring import ExploreOptions
from wsi_anomaly.storage.arrays import read_array, read_attributes, write_arrays
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.prompts import PromptStore, PromptWriter
from wsi_anomaly.storage.record import Recipe, writing

SMALL = ("--rows", "3", "--columns", "4")
"""A map that is drawn at once."""
SLIDES = ("normal_1", "normal_2", "sick")
TILES, LESION = 60, slice(0, 15)
"""Tiles of each slide, and which of them are abnormal in the sick one."""


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal, line breaks taken out, and its exit status."""

    status: int
    out: str
    err: str


Explore = Callable[..., Outcome]
WriteResults = Callable[..., Path]


@pytest.fixture
def explore(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Explore:
    """The command as a shell runs it: `explore(folder, "--of", "scores")`. Whatever it does, without a traceback."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["wsi-anomaly", "explore", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = (" ".join(text.split()) for text in capsys.readouterr())
        assert "Traceback" not in out + err
        return Outcome(int(left.value.code or 0), out, err)

    return run


@pytest.fixture
def write_results(write_tiles: Callable[..., SlideFolder], tmp_path: Path) -> WriteResults:
    """What `run` leaves of three slides: `write_results("name", scores=2, vectors=0, embeddings="conch", z=True)`."""

    def write(
        name: str = "results",
        *,
        scores: int = 2,
        vectors: int = 0,
        embeddings: str = "conch",
        z: bool = True,
        slides: tuple[str, ...] = SLIDES,
        tiles: int = TILES,
        corrupt: tuple[int, ...] = (),
    ) -> Path:
        for slide_id in slides:
            seed = SLIDES.index(slide_id) if slide_id in SLIDES else len(slide_id)
            folder = write_tiles(
                tiles, slide_id=slide_id, seed=seed, tile_px=16, corrupt=corrupt, results=tmp_path / name
            )
            values = np.random.default_rng(seed).normal(size=(tiles, 8)).astype(np.float32)
            if slide_id == "sick":
                values[LESION] += 6
            values[list(corrupt)] = np.nan
            if scores:
                write_scores(folder, values[:, :scores], values[:, 8 - vectors :] if vectors else None)
            if embeddings:
                write_embeddings(folder, values, embeddings)
            if z:
                write_z(folder, values[:, 0])
        return tmp_path / name

    return write


def write_scores(folder: SlideFolder, scores: np.ndarray, vectors: np.ndarray | None = None) -> None:
    """As the stage `score` does; without vectors also as it did before there were any."""
    names = ["mse", "ms_ssim", "lpips"][: scores.shape[1]]
    arrays = {"scores": scores} | ({} if vectors is None else {"vectors": vectors})
    with writing(folder.root, Recipe("score", 1)) as work:
        write_arrays(work.folder / folder.scores.name, arrays, {"detector": "toy", "score_names": names})


def write_embeddings(folder: SlideFolder, vectors: np.ndarray, model: str) -> None:
    """As the stage `prompt` does."""
    attributes = {"image_text_model": model, "image_text_model_digest": "0123456789", "prefix": "", "joiner": ", "}
    count = len(vectors)
    with writing(folder.root, Recipe("prompt", 1, {"model": model})) as work:
        writer = PromptWriter(
            work.folder / folder.prompts.name, tiles=count, embedding_size=8, keywords=["fat"], attributes=attributes
        )
        writer.append(vectors, np.zeros((count, 1), np.float32))
        writer.similarity()
        writer.finish(np.zeros((count, 1), np.int16), np.ones((count, 1), np.float32), ["fat"] * count)


def write_z(folder: SlideFolder, z: np.ndarray) -> None:
    """As the stage `heatmap` does."""
    with writing(folder.root, Recipe("heatmap", 1)) as work:
        write_arrays(work.folder / folder.heatmap.name, {"z_tile": z.astype(np.float64)}, {"threshold_z": 2.0})


def table_of(results: Path) -> list[dict[str, str]]:
    """The rows of typicality.csv."""
    with RunFolder(results).typicality_table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def total(results: Path, column: str) -> int:
    """Of a column of typicality.csv."""
    return sum(int(row[column]) for row in table_of(results))


@pytest.mark.parametrize(
    ("of", "vectors", "said"),
    [
        ("scores", 0, "the scores mse, ms_ssim of toy"),
        ("scores", 4, "the score vectors of toy (4 values a tile)"),
        ("embeddings", 4, "embeddings of conch (01234567)"),
    ],
)
def test_abnormal_tissue_has_a_region_of_its_own(
    write_results: WriteResults, explore: Explore, of: str, vectors: int, said: str
) -> None:
    """The tiles of the lesion lie in cells apart, of high z, at one end of the map."""
    results = write_results(vectors=vectors)
    done = explore(results, "--of", of)
    assert done.status == 0, done.err
    assert f"180 tiles of 3 slides by {said}, on a map" in done.out
    assert read_attributes(RunFolder(results).typicality_map)["features"] == said
    rows = table_of(results)
    abnormal = [row for row in rows if row["slide_id"] == "sick" and int(row["tile"]) in range(15)]
    assert sum(int(row["hits"]) for row in abnormal) == 15
    assert min(float(row["mean_z"]) for row in abnormal) > 3
    assert not any(int(row["hits z up to 2"]) for row in abnormal)
    across = max(int(row["column"]) for row in rows)
    assert len({int(row["column"]) * 2 > across for row in abnormal}) == 1


def test_every_tile_is_counted_though_the_map_is_fitted_to_some(write_results: WriteResults, explore: Explore) -> None:
    """Hits of all groups are those of the cell, and cells without tiles are blank."""
    results = write_results()
    assert explore(results, "--most-tiles", 50, "--rows", 8, "--columns", 5).status == 0
    rows = table_of(results)
    assert [(int(row["row"]), int(row["column"])) for row in rows] == list(np.ndindex(8, 5))
    assert total(results, "hits") == 180
    assert all(int(row["hits"]) == int(row["hits z up to 2"]) + int(row["hits z above 2"]) for row in rows)
    assert {row["slide_id"] for row in rows if row["hits"] == "0"} == {""}
    assert read_attributes(RunFolder(results).typicality_map)["fitted_to"] == 50


def test_the_map_on_disk_is_the_one_of_the_table(write_results: WriteResults, explore: Explore) -> None:
    """Whoever reads it puts each tile into the same cell."""
    results = write_results()
    assert explore(results, *SMALL).status == 0
    run = RunFolder(results)
    arrays = {name: read_array(run.typicality_map, name) for name in ("prototypes", "mean", "deviation")}
    typicality = TypicalityMap(**arrays)
    vectors = np.concatenate([PromptStore(slide.prompts).embedding(slice(None)) for slide in run.slides()])
    hits = np.bincount(place(typicality, vectors).cell, minlength=len(table_of(results)))
    assert hits.tolist() == [int(row["hits"]) for row in table_of(results)]
    assert "embeddings of conch" in read_attributes(run.typicality_map)["features"]


def test_the_order_of_slides_does_not_matter(write_results: WriteResults, explore: Explore) -> None:
    """Picture and table are the same files, byte for byte."""
    left = []
    for name, slides in (("one/results", SLIDES), ("two/results", SLIDES[::-1])):
        results = write_results(name, slides=slides)
        assert explore(results, "--most-tiles", 70, *SMALL).status == 0
        run = RunFolder(results)
        left.append((run.typicality_picture.read_bytes(), run.typicality_table.read_bytes()))
    assert left[0] == left[1]


def test_it_is_done_again_only_where_something_has_changed(write_results: WriteResults, explore: Explore) -> None:
    """Such as an option, a slide or the z of one."""
    results = write_results(slides=SLIDES[:2])
    picture = RunFolder(results).typicality_picture
    made = []
    for change in (
        lambda: explore(results, *SMALL),
        lambda: explore(results, *SMALL),
        lambda: explore(results, *SMALL, "--most-tiles", 60),
        lambda: (write_results(slides=SLIDES[2:]), explore(results, *SMALL, "--most-tiles", 60)),
    ):
        change()
        made.append(picture.stat().st_ino)
    assert made[0] == made[1]
    assert made[1] != made[2] != made[3]
    assert total(results, "hits") == 180


def test_one_score_with_vectors_makes_a_map(write_results: WriteResults, explore: Explore) -> None:
    """Each tile is counted but those without a number."""
    results = write_results(scores=1, vectors=3, corrupt=(3, 40))
    done = explore(results, *SMALL, "--of", "scores")
    assert done.status == 0, done.err
    assert total(results, "hits") == 180 - 6
    assert read_array(RunFolder(results).typicality_map, "prototypes").shape == (3, 4, 3)


def test_where_some_slides_have_no_vectors_scores_make_the_map(write_results: WriteResults, explore: Explore) -> None:
    """Who mixes results of an earlier version is told, and nothing is left out."""
    results = write_results(slides=SLIDES[:2], vectors=3)
    write_results(slides=SLIDES[2:])
    done = explore(results, *SMALL, "--of", "scores")
    assert "1 of 3 slides have scores without score vectors (sick, ...): the map is of scores" in done.err
    assert "180 tiles of 3 slides by the scores mse, ms_ssim of toy" in done.out


def test_slides_are_grouped_by_label(write_results: WriteResults, explore: Explore, tmp_path: Path) -> None:
    """A slide that nobody labelled is a group too, and labels of other slides are named."""
    results, labels = write_results(), tmp_path / "labels.csv"
    labels.write_text("slide_id,label\nnormal_1,normal\nsick,macro\nghost,abnormal\n")
    done = explore(results, *SMALL, "--labels", labels)
    assert done.status == 0
    assert "belong to no slide of the run: ghost" in done.err
    assert "has no label for these slides of the run: normal_2" in done.err
    assert {name for name in table_of(results)[0] if name.startswith("hits ")} == {
        "hits normal",
        "hits macro",
        "hits without label",
    }
    assert [total(results, f"hits {name}") for name in ("normal", "macro", "without label")] == [60, 60, 60]


def test_any_text_is_a_group(write_results: WriteResults, explore: Explore, tmp_path: Path) -> None:
    """Spelt as it stands there first, in the order of the table; columns of other use are not read."""
    results, sites = write_results(), tmp_path / "sites.csv"
    sites.write_text("slide_id;scanner;label\nsick;9;Site Ä, new\nnormal_2;7;Site B\nnormal_1;7;site b\n", "utf-8")
    done = explore(results, *SMALL, "--labels", sites)
    assert done.status == 0, done.err
    assert [name for name in table_of(results)[0] if name.startswith("hits ")] == ["hits Site Ä, new", "hits Site B"]
    assert [total(results, f"hits {name}") for name in ("Site Ä, new", "Site B")] == [60, 120]


@pytest.mark.parametrize(("groups", "said"), [(8, ""), (9, "sites.csv: 9 labels (site 0, site 1, site 2, ...)")])
def test_more_groups_than_a_picture_shows_are_refused(
    write_results: WriteResults, explore: Explore, tmp_path: Path, groups: int, said: str
) -> None:
    """Eight are shown; nine are too many."""
    slides, sites = tuple(f"node_{i}" for i in range(groups)), tmp_path / "sites.csv"
    results = write_results(slides=slides, tiles=7)
    sites.write_text("slide_id,label\n" + "".join(f"{slide},site {i}\n" for i, slide in enumerate(slides)))
    done = explore(results, *SMALL, "--labels", sites)
    assert done.status == (1 if said else 0)
    assert said in done.err


def test_a_folder_of_several_results_names_them(write_results: WriteResults, explore: Explore, tmp_path: Path) -> None:
    """Those of `compare`: the ones that have what is asked for."""
    results = [write_results(f"both/{name}", embeddings="conch" if name == "b" else "") for name in ("a", "b")]
    done = explore(tmp_path / "both")
    assert done.status == 1
    assert f"It has in {results[0]}, {results[1]}: give one of these" in done.err
    assert f"It has in {results[1]}: give one of these" in explore(tmp_path / "both", "--of", "embeddings").err


def test_without_heat_maps_there_is_no_z(write_results: WriteResults, explore: Explore) -> None:
    """All tiles are one group."""
    results = write_results(z=False)
    assert explore(results, *SMALL).status == 0
    assert {row["mean_z"] for row in table_of(results)} == {""}
    assert total(results, "hits all") == 180


def test_scores_make_the_map_where_there_are_no_embeddings(write_results: WriteResults, explore: Explore) -> None:
    """Without being told."""
    done = explore(write_results(embeddings=""), *SMALL)
    assert "by the scores mse, ms_ssim of toy" in done.out


def test_slides_without_embeddings_are_left_out_and_counted(write_results: WriteResults, explore: Explore) -> None:
    """The others make the map."""
    results = write_results(slides=SLIDES[:2])
    write_results(slides=SLIDES[2:], embeddings="")
    done = explore(results, *SMALL)
    assert "left out, since they have no embeddings: 1 slides" in done.err
    assert "120 tiles of 2 slides" in done.out


@pytest.mark.parametrize("of", ["scores", "embeddings"])
def test_unreadable_tiles_are_left_out(write_results: WriteResults, explore: Explore, of: str) -> None:
    """They are no kind of tissue."""
    results = write_results(corrupt=(3, 40))
    assert explore(results, *SMALL, "--of", of).status == 0
    assert total(results, "hits") == 180 - 6
    assert not {row["tile"] for row in table_of(results)} & {"3", "40"}


@pytest.mark.parametrize(
    ("written", "arguments", "said"),
    [
        ({"scores": 0, "embeddings": "", "z": False}, (), "'score' has run for no slide"),
        ({"embeddings": ""}, ("--of", "embeddings"), "'prompt' has run for no slide"),
        ({"tiles": 16, "slides": SLIDES}, (), "48 tiles with embeddings of conch (01234567); a map needs 50"),
        ({"scores": 1}, ("--of", "scores"), "differ in fewer than two respects (the score mse of toy)"),
    ],
)
def test_what_makes_no_map_is_named(
    write_results: WriteResults,
    explore: Explore,
    written: dict[str, object],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    """Nothing to go by, too few tiles, or one score; nothing is left behind."""
    results = write_results(**written)
    done = explore(results, *arguments)
    assert done.status == 1
    assert said in done.err
    assert [path.name for path in results.iterdir()] == ["slides"]


def test_slides_of_different_models_are_not_mixed(write_results: WriteResults, explore: Explore) -> None:
    """Their embeddings mean different things."""
    results = write_results(slides=SLIDES[:1])
    write_results(slides=SLIDES[1:], embeddings="plip")
    done = explore(results)
    assert done.status == 1
    assert "normal_1: embeddings of conch" in done.err
    assert "embeddings of plip" in done.err


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("slide_id,label\nghost,normal\n", "none of its slide_ids (ghost, ...) is a slide of this run"),
        ("slide_id,label\nsick,blue\nsick,red\n,red\n", "row 3: 'sick' is there already row 4: slide_id is empty"),
        ("slide_id,label\nsick,Site 1, new\n", "row 2: 3 cells in 2 columns; put a text with commas in quotes"),
        ("slide_id,cohort\nsick,blue\n", "columns are 'slide_id, cohort'; 'label' must be there, once"),
        ("slide_id,label\nsick,\n", "none of its slides has a label"),
        ("nothing", "columns are 'nothing'; 'slide_id' must be there, once"),
    ],
)
def test_labels_that_cannot_be_used_are_named(
    write_results: WriteResults, explore: Explore, tmp_path: Path, table: str, said: str
) -> None:
    """Of no slide here, of no meaning, or no table."""
    (tmp_path / "labels.csv").write_text(table)
    done = explore(write_results(), "--labels", tmp_path / "labels.csv")
    assert done.status == 1
    assert said in done.err


@pytest.mark.parametrize("arguments", [("--rows", 1), ("--columns", 61), ("--most-tiles", 49), ("--of", "colours")])
def test_wrong_usage_is_refused(explore: Explore, tmp_path: Path, arguments: tuple[object, ...]) -> None:
    """Before anything is read."""
    assert explore(tmp_path, *arguments).status == 2


def test_a_folder_that_is_not_there_is_named(explore: Explore, tmp_path: Path) -> None:
    """And not made."""
    done = explore(tmp_path / "nowhere")
    assert done.status == 1
    assert "nowhere" in done.err
    assert not (tmp_path / "nowhere").exists()


def test_the_help_tells_the_default_number_of_tiles() -> None:
    """Which the options class decides."""
    (option,) = (one for one in get_command(app).commands["explore"].params if one.name == "most_tiles")  # type: ignore[attr-defined]
    assert f"Without: {ExploreOptions().most_tiles}." in str(getattr(option, "help", ""))
