"""Bad input of `wsi-anomaly evaluate`: what a user is told, the exit status, and that the rest goes on."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_anomaly.cli.app import main
from wsi_anomaly.imaging.geometry import Grid
from wsi_anomaly.storage.arrays import write_arrays
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import Recipe, writing
from wsi_anomaly.storage.shards import compressed
from wsi_anomaly.storage.tiles import TilePlaces, TileStatus, TileWriter

SIDE, TILE_PX = 10, 16
SLIDES = ("normal_1", "normal_2", "sick_1", "sick_2")
LESION = (2, 2, 6, 6)
"""Left, top, right and bottom, in tiles."""
Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal, line breaks taken out, and its exit status."""

    status: int
    out: str
    err: str


Evaluate = Callable[..., Outcome]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """The command as a shell runs it: `evaluate(folder, "--labels", table)`. Whatever it does, without a traceback."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["wsi-anomaly", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = (" ".join(text.split()) for text in capsys.readouterr())
        assert "Traceback" not in out + err
        return Outcome(int(left.value.code or 0), out, err)

    return run


def write_results(root: Path, *, detector: str = "one", tile_px: int = TILE_PX) -> Path:
    """What `run` leaves of the four slides; z is 4 higher in the lesion of two of them."""
    for number, slide_id in enumerate(SLIDES):
        z = np.random.default_rng(number).normal(0, 1, (SIDE, SIDE))
        if slide_id.startswith("sick"):
            z[LESION[1] : LESION[3], LESION[0] : LESION[2]] += 4
        write_slide(RunFolder(root).slide(slide_id), z.ravel(), {"detector": detector}, tile_px)
    return root


def write_slide(folder: SlideFolder, z: np.ndarray, detector: dict[str, str], tile_px: int) -> None:
    """Mask, tiles, scores and z of a slide that is all tissue, as the stages leave them."""
    side = SIDE * tile_px
    grid = Grid.over((0, 0, side, side), downsample=(1.0, 1.0), tile_px=tile_px, stride_px=tile_px)
    places = TilePlaces(grid.origins(grid.cells()), grid.cells(), np.ones(SIDE**2, np.float32))
    facts = {"slide_id": folder.slide_id, "mpp": [0.5, 0.5], "overview_downsample": [8.0, 8.0]}
    frame = {"size_level0_px": [side, side], "bounds_level0_px": [0, 0, side, side]}
    tiles = {"tile_mpp": 0.5, "stride_px": tile_px, "grid": asdict(grid)}
    everywhere = np.ones((side // 8, side // 8), np.bool_)
    overview = np.full((*everywhere.shape, 3), (190, 120, 170), np.uint8)
    with writing(folder.root, Recipe("mask", 1)) as work:
        arrays = {"tissue": everywhere, "readable": everywhere, "overview": overview}
        write_arrays(work.folder / folder.tissue.name, arrays, facts | frame)
    with (
        writing(folder.root, Recipe("tile", 1)) as work,
        TileWriter(work.folder / folder.tiles.name, places, tile_px=tile_px, attributes=facts | frame | tiles) as tile,
    ):
        tile.append(compressed(np.zeros((SIDE**2, tile_px, tile_px, 3), np.uint8)), [TileStatus.OK] * SIDE**2)
    with writing(folder.root, Recipe("score", 1, detector)) as work:
        write_arrays(work.folder / folder.scores.name, {"scores": z.astype(np.float32)[:, None]}, detector)
    with writing(folder.root, Recipe("heatmap", 1, detector)) as work:
        write_arrays(work.folder / folder.heatmap.name, {"z_tile": z}, {})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results to copy, since `evaluate` writes into them."""
    return write_results(tmp_path_factory.mktemp("written") / "results")


@pytest.fixture
def results(written: Path, tmp_path: Path) -> Path:
    """Two normal slides and two abnormal ones."""
    return shutil.copytree(written, tmp_path / "results")


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """A folder with the outlines of both abnormal slides, in ASAP's XML."""
    folder = tmp_path / "truth"
    folder.mkdir()
    for name in ("sick_1", "sick_2"):
        (folder / f"{name}.xml").write_text(asap(LESION))
    return folder


def asap(*rectangles: Corners, group: str = "Tumor") -> str:
    """XML of ASAP with rectangles in tiles."""

    def coordinates(rectangle: Corners) -> Iterator[str]:
        left, top, right, bottom = (side * TILE_PX for side in rectangle)
        for order, (x, y) in enumerate(((left, top), (right, top), (right, bottom), (left, bottom))):
            yield f'<Coordinate Order="{order}" X="{x}" Y="{y}"/>'

    annotations = "".join(
        f'\n<Annotation Name="{number}" Type="Polygon" PartOfGroup="{group}">'
        f"<Coordinates>{''.join(coordinates(rectangle))}</Coordinates></Annotation>"
        for number, rectangle in enumerate(rectangles)
    )
    return f"<ASAP_Annotations><Annotations>{annotations}</Annotations></ASAP_Annotations>"


def table(path: Path, rows: Mapping[str, str], *, header: str = "slide_id,label") -> Path:
    """A CSV of labels."""
    path.write_text("\n".join([header, *(f"{slide_id},{label}" for slide_id, label in rows.items())]) + "\n")
    return path


def refused(outcome: Outcome, *parts: str) -> None:
    """With exit status 1 and one message that has all of these parts; nothing is printed as a result."""
    assert outcome.status == 1
    assert "Error: " in outcome.err
    assert [part for part in parts if part not in outcome.err] == [], outcome.err
    assert "AUROC" not in outcome.out


def measured(results: Path, detector: str = "one") -> dict[str, float | int | None]:
    """What stands in metrics.json."""
    return json.loads((results / "metrics.json").read_text())["detectors"][detector]


def test_without_fault_nothing_is_warned_of(evaluate: Evaluate, results: Path, truth: Path, tmp_path: Path) -> None:
    """So that the other tests can see a difference."""
    labels = table(tmp_path / "labels.csv", {"normal_1": "normal", "normal_2": "normal"})
    done = evaluate(results, "--annotations", truth, "--labels", labels)
    assert (done.status, done.err) == (0, "")
    assert measured(results)["slide_auroc_z_max"] == 1.0
    assert measured(results)["warnings"] == []


def test_a_malformed_xml_is_named_with_its_line(evaluate: Evaluate, results: Path, truth: Path) -> None:
    """And its slide."""
    (truth / "sick_1.xml").write_text("<ASAP_Annotations>\n<Annotations>\n<Annotation </Annotations>")
    refused(evaluate(results, "--annotations", truth), "sick_1.xml, line 3", "broken XML", "save it again in ASAP")


def test_an_xml_that_is_not_of_asap_is_refused(evaluate: Evaluate, results: Path, truth: Path) -> None:
    """Such as one of ImageScope."""
    (truth / "sick_1.xml").write_text("<Annotations><Annotation/></Annotations>")
    refused(evaluate(results, "--annotations", truth), "sick_1.xml", "no XML of ASAP", "export it from ASAP")


def test_outlines_outside_the_slide_are_refused(evaluate: Evaluate, results: Path, truth: Path) -> None:
    """They are another slide's, or of another resolution."""
    (truth / "sick_1.xml").write_text(asap((200, 300, 210, 310)))
    outcome = evaluate(results, "--annotations", truth)
    refused(outcome, "sick_1", "x 3200, y 4800", "outside the slide of 160 x 160 px", "must be level-0 pixels")


def test_what_cannot_be_used_is_told_of_and_the_rest_goes_on(evaluate: Evaluate, results: Path, truth: Path) -> None:
    """Polygons off the slide or without area, a file of no slide, slides without any."""
    (truth / "sick_1.xml").write_text(asap(LESION, (200, 300, 210, 310), (3, 3, 3, 3), (1, 4, 8, 4)))
    (truth / "sick_9.xml").write_text(asap(LESION))
    done = evaluate(results, "--annotations", truth)
    assert done.status == 0
    assert "sick_1.xml: 1 polygon (line 3) outside the slide, left out" in done.err
    assert "sick_1.xml: 2 polygons (line 4, line 5) without an area" in done.err
    assert "these belong to no slide of the run: sick_9.xml" in done.err
    assert "nobody said anything of these slides, they count as normal: normal_1, normal_2" in done.err
    assert measured(results)["abnormal_tiles"] == 32


def test_an_unknown_group_is_refused_with_the_option_that_gives_it_a_meaning(
    evaluate: Evaluate, results: Path, truth: Path
) -> None:
    """Also with what is known."""
    (truth / "sick_1.xml").write_text(asap(LESION, group="Befund"))
    refused(evaluate(results, "--annotations", truth), "sick_1", "'Befund'", "--group", "Befund=abnormal", "known: ")


def test_a_mask_of_several_numbers_is_refused_with_the_option_that_says_which_count(
    evaluate: Evaluate, results: Path, truth: Path
) -> None:
    """Also with the numbers."""
    write_mask_of_two_numbers(truth)
    refused(evaluate(results, "--annotations", truth), "sick_2.png", "1, 2", "--mask-values")


def test_the_options_of_the_messages_help(evaluate: Evaluate, results: Path, truth: Path) -> None:
    """A group and a number without a meaning get one."""
    (truth / "sick_1.xml").write_text(asap(LESION, group="Befund"))
    write_mask_of_two_numbers(truth)
    done = evaluate(results, "--annotations", truth, "--group", "Befund=abnormal", "--mask-values", "1")
    assert done.status == 0
    assert measured(results)["abnormal_tiles"] == 16 + 20


def write_mask_of_two_numbers(truth: Path) -> None:
    """In place of the outlines of an abnormal slide: 1 in two rows of tiles, 2 in five."""
    (truth / "sick_2.xml").unlink()
    numbers = np.zeros((SIDE * TILE_PX, SIDE * TILE_PX), np.uint8)
    numbers[: 2 * TILE_PX], numbers[5 * TILE_PX :] = 1, 2
    Image.fromarray(numbers).save(truth / "sick_2.png")


def test_a_meaning_that_there_is_not_is_refused(evaluate: Evaluate, results: Path, truth: Path) -> None:
    """With those that there are."""
    outcome = evaluate(results, "--annotations", truth, "--group", "Befund=sick")
    refused(outcome, "'Befund=sick'", "NAME=abnormal", "NAME=excluded", "NAME=ignored")


def test_an_abnormal_slide_without_annotation_is_excluded_and_named(
    evaluate: Evaluate, results: Path, truth: Path, tmp_path: Path
) -> None:
    """From tiles, segmentation and lesions; on the screen and in metrics.json."""
    (truth / "sick_2.xml").unlink()
    labels = table(tmp_path / "labels.csv", {"normal_1": "normal", "normal_2": "normal", "sick_2": "abnormal"})
    done = evaluate(results, "--annotations", truth, "--labels", labels)
    assert done.status == 0
    assert "abnormal without annotation" in done.err
    assert "sick_2" in done.err
    assert any("sick_2" in str(warning) for warning in measured(results)["warnings"] or ())  # type: ignore[union-attr]
    assert (measured(results)["abnormal_slides"], measured(results)["abnormal_tiles"]) == (2, 16)
    assert measured(results)["tiles"] == 300


def test_a_single_class_has_no_auroc_and_says_so(evaluate: Evaluate, results: Path, tmp_path: Path) -> None:
    """The rest is given."""
    done = evaluate(results, "--labels", table(tmp_path / "labels.csv", dict.fromkeys(SLIDES, "normal")))
    assert done.status == 0
    assert "no slide is abnormal" in done.out
    assert "the rest is given" in done.out
    assert measured(results)["slide_auroc_z_max"] is None
    assert measured(results)["tile_auroc"] is None
    assert measured(results)["tnr_normal_slides"] is not None


def test_tiles_of_different_sizes_cannot_be_compared(
    evaluate: Evaluate, results: Path, truth: Path, tmp_path: Path
) -> None:
    """Both sizes and folders are named."""
    other = write_results(tmp_path / "coarse", detector="two", tile_px=32)
    outcome = evaluate(results, other, "--annotations", truth)
    refused(outcome, "results: 16 px at 0.5 µm/px", "coarse: 32 px at 0.5 µm/px", "the same tiles")
    assert not (results / "metrics.json").exists()


@pytest.mark.parametrize("kind", ["nowhere", "empty", "file"])
def test_what_is_no_result_is_refused(
    evaluate: Evaluate, results: Path, truth: Path, tmp_path: Path, kind: str
) -> None:
    """With the command that makes one, also as the second of two."""
    place = tmp_path / kind
    if kind == "empty":
        place.mkdir()
    elif kind == "file":
        place.touch()
    for folders in ((place,), (results, place)):
        refused(evaluate(*folders, "--annotations", truth), kind, "no slide has a heat map", "wsi-anomaly run")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("slide,label\nsick_1,abnormal\n", ("'slide'", "slide_id")),
        ("slide_id,verdict\nsick_1,abnormal\n", ("'verdict'", "label")),
        ("slide_id\nsick_1\n", ("'slide_id'", "label")),
        ("slide_id,label\n", ("has no labels", "add the column label")),
        ("", ("must be slide_id and label",)),
        ("slide_id,label\nsick_1,doubtful\n", ("row 2", "'doubtful'", "normal, 0, abnormal")),
        ("slide_id,label\nsick_1,normal\nsick_1,abnormal\n", ("row 3", "'sick_1' is there already")),
        ("slide_id,label\nnobody,normal\n", ("nobody", "normal_1", "slides.csv")),
    ],
    ids=["no slide_id", "no label", "one column", "no row", "nothing", "no such label", "twice", "no such slide"],
)
def test_a_table_of_labels_that_cannot_be_used_is_refused(
    evaluate: Evaluate, results: Path, tmp_path: Path, content: str, parts: tuple[str, ...]
) -> None:
    """With what must be changed in it."""
    (tmp_path / "labels.csv").write_text(content)
    refused(evaluate(results, "--labels", tmp_path / "labels.csv"), "labels.csv", *parts)


@pytest.mark.parametrize("option", ["--labels", "--annotations"])
def test_a_place_that_is_not_there_is_refused(evaluate: Evaluate, results: Path, tmp_path: Path, option: str) -> None:
    """By name."""
    refused(evaluate(results, option, tmp_path / "missing.csv"), "missing.csv")


def test_annotations_of_no_slide_are_refused(evaluate: Evaluate, results: Path, tmp_path: Path) -> None:
    """With names from both sides."""
    folder = tmp_path / "others"
    folder.mkdir()
    (folder / "patient_7.xml").write_text(asap(LESION))
    refused(evaluate(results, "--annotations", folder), "others", "patient_7.xml", "normal_1", "slides.csv")


def test_several_files_for_one_slide_are_refused(evaluate: Evaluate, results: Path, truth: Path) -> None:
    """Which one is meant, nobody knows."""
    Image.new("L", (160, 160)).save(truth / "sick_1_mask.png")
    refused(evaluate(results, "--annotations", truth), "sick_1.xml, sick_1_mask.png", "Leave one")


def test_a_mask_of_other_proportions_is_refused(evaluate: Evaluate, results: Path, truth: Path) -> None:
    """Both sizes are named."""
    (truth / "sick_1.xml").unlink()
    Image.new("L", (60, 30), 1).save(truth / "sick_1.png")
    outcome = evaluate(results, "--annotations", truth)
    refused(outcome, "sick_1.png", "60 x 30 px", "160 x 160", "export a mask of all of it")


def test_a_run_given_twice_is_refused(evaluate: Evaluate, results: Path, truth: Path) -> None:
    """A detector cannot be compared with itself."""
    refused(evaluate(results, results, "--annotations", truth), "results", "twice", "once")
    refused(evaluate(results, results.parent / "truth" / ".." / "results", "--annotations", truth), "twice")


def test_runs_of_equal_detectors_in_folders_of_equal_names_stand_side_by_side(
    evaluate: Evaluate, written: Path, tmp_path: Path
) -> None:
    """Neither takes the place of the other."""
    runs = [shutil.copytree(written, tmp_path / place / "results") for place in ("monday", "friday")]
    labels = table(tmp_path / "labels.csv", dict.fromkeys(SLIDES, "normal"))
    assert evaluate(*runs, "--labels", labels).status == 0
    found = json.loads((runs[0] / "metrics.json").read_text())
    assert len(found["detectors"]) == 2
    assert len(found["comparisons"]) == 1


@pytest.mark.parametrize("taken", ["metrics.json", "evaluation"])
def test_results_that_cannot_be_written_are_told_of(evaluate: Evaluate, results: Path, truth: Path, taken: str) -> None:
    """Here because something of another kind has the name."""
    (results / "evaluation").touch() if taken == "evaluation" else (results / "metrics.json").mkdir()
    refused(evaluate(results, "--annotations", truth), str(results), "cannot be written", "permissions")


def test_a_folder_without_permission_is_told_of(evaluate: Evaluate, results: Path, truth: Path) -> None:
    """With what to do."""
    results.chmod(0o500)
    try:
        if os.access(results, os.W_OK):
            pytest.skip("this user may write everywhere")
        refused(evaluate(results, "--annotations", truth), str(results), "cannot be written", "permissions")
    finally:
        results.chmod(0o700)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--abnormal-from", "0"),
        ("--abnormal-from", "1.5"),
        ("--abnormal-from", "-0.5"),
        ("--abnormal-from", "nan"),
        ("--normal-up-to", "1"),
        ("--normal-up-to", "-0.1"),
        ("--threshold-z", "inf"),
    ],
)
def test_a_choice_out_of_range_is_refused(
    evaluate: Evaluate, results: Path, truth: Path, option: str, value: str
) -> None:
    """The option and its value are named."""
    outcome = evaluate(results, "--annotations", truth, option, value)
    assert outcome.status in {1, 2}
    assert option in outcome.err or option.strip("-").replace("-", "_") in outcome.err
    assert value.rstrip("0").rstrip(".") in outcome.err
    assert not (results / "metrics.json").exists()


def test_choices_that_contradict_each_other_are_refused(evaluate: Evaluate, results: Path, truth: Path) -> None:
    """A tile cannot be normal and abnormal."""
    outcome = evaluate(results, "--annotations", truth, "--abnormal-from", "0.3", "--normal-up-to", "0.5")
    assert outcome.status in {1, 2}
    assert "0.3" in outcome.err
    assert "0.5" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "--annotations, --labels or both"),
        (("--protocol", "mine", "--labels", "x.csv"), "'released'"),
        (("--abnormal-from", "much", "--labels", "x.csv"), "--abnormal-from"),
        (("--mask-values", "one", "--labels", "x.csv"), "one"),
    ],
)
def test_wrong_usage_has_exit_status_2(
    evaluate: Evaluate, results: Path, arguments: tuple[str, ...], part: str
) -> None:
    """As shells expect, and the option is named."""
    outcome = evaluate(results, *arguments)
    assert outcome.status == 2
    assert part in outcome.err
