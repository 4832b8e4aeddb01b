"""What lies in the folder of an evaluation: which files, what the tables say, what pictures show."""

import csv
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsi_anomaly.annotations import find_annotations
from wsi_anomaly.imaging.classification import rank
from wsi_anomaly.imaging.intervals import Comparison
from wsi_anomaly.stages.evaluate import Findings, Protocol, evaluate
from wsi_anomaly.stages.evaluate.evidence import gather
from wsi_anomaly.stages.evaluate.side_by_side import write_pictures
from wsi_anomaly.stages.evaluate.tables_of import write_tables
from wsi_anomaly.storage.arrays import write_arrays
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import Recipe, writing

TILE_PX, COLUMNS, ROWS = 32, 20, 4
SIZE_PX = (COLUMNS * TILE_PX, ROWS * TILE_PX)
SICK_PX = (96, 32, 576, 96)
"""Left, top, right and bottom of what is abnormal: 15 by 2 tiles, or 240 by 32 µm."""
CURVES = {f"{kind}_{of}.png" for kind in ("roc", "pr") for of in ("tiles", "slides_z_max", "slides_z_99")}
TABLES = {"tables.md", "tables.tex", "tables_turned.md", "tables_turned.tex", "measures.csv", "slides.csv"}

DASH = "\N{EN DASH}"
WriteRun = Callable[..., RunFolder]


@pytest.fixture
def write_run(write_tiles: Callable[..., SlideFolder], tmp_path: Path) -> WriteRun:
    """Leaves results: `write_run("one", slides, lift=3.0)`, where the z of what is abnormal are higher by so much."""

    def write(detector: str, slides: dict[str, str], *, lift: float) -> RunFolder:
        random = np.random.default_rng(sum(map(ord, detector)))
        for slide_id, label in slides.items():
            folder = write_tiles(COLUMNS * ROWS, slide_id=slide_id, columns=COLUMNS, results=tmp_path / detector)
            z = random.normal(0, 1, (ROWS, COLUMNS))
            z[1:3, 3:18] += lift * (label != "normal")
            finish(folder, z.ravel(), detector)
        return RunFolder(tmp_path / detector)

    return write


def finish(folder: SlideFolder, z: np.ndarray, detector: str) -> None:
    """Leave overview, scores and z as the stages do."""
    facts = {
        "slide_id": folder.slide_id,
        "mpp": [0.5, 0.5],
        "overview_downsample": [8.0, 8.0],
        "size_level0_px": list(SIZE_PX),
        "bounds_level0_px": [0, 0, *SIZE_PX],
    }
    with writing(folder.root, Recipe("mask", 1)) as work:
        overview = np.full((SIZE_PX[1] // 8, SIZE_PX[0] // 8, 3), 240, np.uint8)
        write_arrays(work.folder / folder.tissue.name, {"overview": overview}, facts)
    with writing(folder.root, Recipe("score", 1, {"detector": detector})) as work:
        write_arrays(work.folder / folder.scores.name, {"scores": z[:, None]}, {"detector": detector})
    with writing(folder.root, Recipe("heatmap", 1, {"detector": detector})) as work:
        write_arrays(work.folder / folder.heatmap.name, {"z_tile": z.astype(np.float64)}, {})


def outline(path: Path, *areas: tuple[str, tuple[int, int, int, int]]) -> None:
    """Rectangles of a class each."""
    features = []
    for name, (left, top, right, bottom) in areas:
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "annotation", "classification": {"name": name}},
            }
        )
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def cohort(normal: int = 3, **abnormal: int) -> dict[str, str]:
    """The label of each slide: `cohort(3, macro=2)`."""
    return {f"{label}_{i}": label for label, count in {"normal": normal, **abnormal}.items() for i in range(count)}


def truth(folder: Path, slides: dict[str, str]) -> dict[str, Path]:
    """Outlines of all abnormal slides, and the labels."""
    for slide_id, label in slides.items():
        if label != "normal":
            outline(folder / "truth" / f"{slide_id}.geojson", ("Tumor", SICK_PX))
    rows = "".join(f"{slide_id},{label}\n" for slide_id, label in slides.items())
    (folder / "labels.csv").write_text(f"slide_id,label\n{rows}")
    return {"annotations": folder / "truth", "labels": folder / "labels.csv"}


def found(
    first: float = 0.9, *, groups: tuple[str, ...] = (), warnings: tuple[str, ...] = (), **fields: Any
) -> Findings:
    """What a detector is worth: AUROC and the like are `first`, or a bit more for each of the groups."""
    ranking = rank(np.array([1.0, 2.0]), np.array([False, True]))
    measures: dict[str, float | int | None] = {"slides": 8, "abnormal_slides": 5, "tiles": 1000, "abnormal_tiles": 30}
    measures |= {"tile_auroc": first, "tile_aupr": None, "tnr_normal_slides": first, "froc_score": 1, "pro_auc": first}
    for i, group in enumerate(("", *(f"_{group}" for group in groups))):
        slides = (f"slide_{measure}_{score}" for measure in ("auroc", "aupr") for score in ("z_max", "z_99"))
        for name in (*slides, "dice_abnormal_slides", "iou_abnormal_slides"):
            measures[name + group] = first + 0.01 * i
    given = {"intervals": {"slide_auroc_z_max": (first - 0.1, first + 0.1)}, "per_slide": (), "froc": None} | fields
    return Findings(measures=measures, tiles=ranking, slides={}, warnings=warnings, **given)


def tables_of(folder: Path, findings: dict[str, Findings], **comparisons: dict[str, Comparison]) -> list[str]:
    """The two tables in Markdown, turned or not."""
    write_tables(folder, findings, comparisons, Protocol())
    return (folder / "tables.md").read_text().split("Segmentation and lesions")


def rows_of(path: Path) -> list[dict[str, str]]:
    """Of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def lines_of(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without the rule."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return [lines[0], *lines[2:]]


def test_everything_is_left_for_people(write_run: WriteRun, tmp_path: Path) -> None:
    """Pictures of slides lie apart, so that no slide_id can be the name of another; nothing is in metrics.json only."""
    slides = cohort(macro=2, roc_tiles=2)
    files = truth(tmp_path, {name: "macro" if label != "normal" else label for name, label in slides.items()})
    runs = [write_run("sighted", slides, lift=6.0), write_run("blind", slides, lift=-6.0)]
    done = evaluate(runs, protocol=Protocol(resamples=100), **files)
    names = {path.name for path in done.folder.iterdir()}
    assert names == CURVES | TABLES | {"froc.png", "z_histogram.png", "calibration.png", "slides"}
    pictures = {path.stem for path in (done.folder / "slides").iterdir()}
    assert pictures == {"macro_0", "macro_1", "roc_tiles_0", "roc_tiles_1"}
    rows = {(row["detector"], row["measure"]): row for row in rows_of(done.folder / "measures.csv")}
    content = json.loads(runs[0].metrics.read_text())
    for detector, measures in content["detectors"].items():
        intervals, _ = measures.pop("intervals"), measures.pop("warnings")
        for name, value in measures.items():
            assert rows[detector, name]["value"] == ("" if value is None else str(value))
        for name, ends in intervals.items():
            assert [float(rows[detector, name][end]) for end in ("low", "high")] == ends
    for name, test in content["comparisons"]["blind"].items():
        row = rows["blind", name]
        assert (float(row["first_minus_this"]), float(row["p_value"])) == (test["difference"], test["p_value"])
        assert row["test"] == test["method"]
    assert len(rows_of(done.folder / "slides.csv")) == 14


def test_tables_have_the_columns_of_the_paper(tmp_path: Path) -> None:
    """Classification by level and subgroup, then segmentation; detectors in rows."""
    first, second = tables_of(tmp_path, {"one": found(groups=("macro", "micro")), "two": found(0.8)})
    heads = [
        f"{slides} · {score} · {measure}"
        for slides in ("Slides", "Slides, macro", "Slides, micro")
        for score in ("Z_MAX", "Z_99")
        for measure in ("AUROC", "AUPR")
    ]
    lines = lines_of(first)
    assert lines[0] == ["Detector", "Tiles · AUROC", "Tiles · AUPR", *heads]
    assert lines[1][:4] == ["one", "**0.900**", DASH, f"**0.900** (0.800{DASH}1.000)"]
    assert lines[2] == ["two", "0.800", DASH, f"0.800 (0.700{DASH}0.900)", "0.800", "0.800", "0.800", *[DASH] * 8]
    assert lines_of(second)[0] == [
        "Detector",
        "Normal slides · TNR",
        *(f"Abnormal slides{of} · {name}" for of in ("", ", macro", ", micro") for name in ("Dice", "IoU")),
        "Lesions · FROC score",
        "Lesions · PRO-AUC",
    ]
    assert lines_of(second)[1][2:5] == ["**0.900**", "**0.900**", "0.910"]


def test_tables_lie_there_in_both_directions_and_both_languages(tmp_path: Path) -> None:
    """With the same figures."""
    upright = lines_of(tables_of(tmp_path, {"one": found(), "two": found(0.8)})[0])
    turned = lines_of((tmp_path / "tables_turned.md").read_text().split("Segmentation and lesions")[0])
    assert [list(line)[1:] for line in zip(*turned, strict=True)] == [line[1:] for line in upright]
    for name, head in (("tables.tex", "{lrrrrrr}"), ("tables_turned.tex", "{lllrr}")):
        latex = (tmp_path / name).read_text()
        assert latex.startswith("% Needs \\usepackage{booktabs}.\n")
        assert latex.count(r"\end{table}") == 2
        assert rf"\begin{{tabular}}{head}" in latex
        assert r"\label{tab:segmentation}" in latex


def test_p_values_stand_beside_the_figures_of_further_detectors(tmp_path: Path) -> None:
    """A note says of what, only below a table that has one."""
    tests = {"slide_auroc_z_max": Comparison(0.1, 0.0123, "DeLong")}
    first, second = tables_of(tmp_path, {"one": found(), "two": found(0.8)}, two=tests)
    assert [line[3] for line in lines_of(first)[1:]] == [
        f"**0.900** (0.800{DASH}1.000)",
        f"0.800 (0.700{DASH}0.900), p = 0.012",
    ]
    assert "- p: two-sided, of the difference from one on the slides that both have seen; DeLong's test" in first
    assert "two-sided" not in second
    assert r"{\scriptsize p = 0.012}" in (tmp_path / "tables.tex").read_text()


def test_warnings_choices_and_counts_stand_below_every_table(tmp_path: Path) -> None:
    """Counts once where all detectors have seen the same, else for each."""
    for table in tables_of(tmp_path, {"one": found(warnings=("a", "b")), "two": found(0.8)}):
        assert table.count("- 8 slides, 5 of them abnormal; 1,000 tiles, 30 of them abnormal.") == 1
        assert "- † a; b" in table
        assert all(f"- {choice}" in table for choice in Protocol().choices())
    other = found(0.8)
    fewer = replace(other, measures={**other.measures, "slides": 7})
    for table in tables_of(tmp_path, {"one": found(), "two": fewer}):
        assert "- one: 8 slides, 5 of them abnormal; " in table
        assert "- two: 7 slides, 5 of them abnormal; " in table


def test_each_slide_of_each_detector_has_a_row(tmp_path: Path) -> None:
    """With what was measured on it; what is not known is empty."""
    rows = ({"slide_id": "a", "z_99": 1.5, "dice": None}, {"slide_id": "b,c", "z_99": 2, "dice": 0.25})
    tables_of(tmp_path, {"one": found(per_slide=rows), "two": found(per_slide=rows[:1])})
    assert rows_of(tmp_path / "slides.csv") == [
        {"detector": "one", "slide_id": "a", "z_99": "1.5", "dice": ""},
        {"detector": "one", "slide_id": "b,c", "z_99": "2", "dice": "0.25"},
        {"detector": "two", "slide_id": "a", "z_99": "1.5", "dice": ""},
    ]


def test_what_cannot_be_drawn_any_more_is_removed(write_run: WriteRun, tmp_path: Path) -> None:
    """An earlier evaluation must not be taken for this one; what others left stays."""
    slides = cohort(abnormal=2)
    run = write_run("one", slides, lift=3.0)
    files = truth(tmp_path, slides)
    evaluate([run], protocol=Protocol(resamples=100), **files)
    (run.evaluation / "my notes.txt").write_text("mine")
    (tmp_path / "labels.csv").write_text("slide_id,label\n" + "".join(f"{name},normal\n" for name in slides))
    evaluate([run], protocol=Protocol(resamples=100), labels=files["labels"])
    names = {path.name for path in run.evaluation.iterdir()}
    assert names == TABLES | {"z_histogram.png", "calibration.png", "slides", "my notes.txt"}
    assert not list((run.evaluation / "slides").iterdir())


def pictures(run: RunFolder, annotations: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """Pixels by slide_id."""
    folder.mkdir()
    slide_ids = [slide.slide_id for slide in run.slides()]
    evidence = gather(run, find_annotations(annotations, slide_ids), Protocol(), **options)
    rows = tuple({"slide_id": slide_id, "z_99": 1.0, "dice": None} for slide_id in slide_ids)
    write_pictures(folder, {"one": evidence}, {"one": found(per_slide=rows)})
    drawn = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as picture:
            drawn[path.stem] = np.asarray(picture.convert("RGB")).astype(int)
    return drawn


def test_of_many_slides_the_first_are_drawn_and_the_log_says_so(
    write_run: WriteRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By slide_id, so that they are the same ones each time."""
    slides = {f"slide_{i:02d}": "abnormal" if i % 8 else "normal" for i in range(25)}
    run, files = write_run("one", slides, lift=3.0), truth(tmp_path, slides)
    with caplog.at_level(logging.INFO):
        drawn = pictures(run, files["annotations"], tmp_path / "drawn")
    assert list(drawn) == sorted(name for name, label in slides.items() if label == "abnormal")[:20]
    assert "20 of the 21 annotated slides are drawn, the first by slide_id: slide_01 to slide_22" in caplog.text


def test_a_mask_is_outlined_as_polygons_are(write_run: WriteRun, tmp_path: Path) -> None:
    """The same area gives the same picture, another one another."""
    slides = cohort(0, abnormal=2)
    run, files = write_run("one", slides, lift=3.0), truth(tmp_path, slides)
    outlined = pictures(run, files["annotations"], tmp_path / "outlined")
    left, top, right, bottom = SICK_PX
    for slide_id, shift in (("abnormal_0", 0), ("abnormal_1", 32)):
        mask = np.zeros(SIZE_PX[::-1], np.uint8)
        mask[top:bottom, left + shift : right + shift] = 1
        (files["annotations"] / f"{slide_id}.geojson").unlink()
        Image.fromarray(mask).save(files["annotations"] / f"{slide_id}.png")
    masked = pictures(run, files["annotations"], tmp_path / "masked")
    changed = {name: (np.abs(masked[name] - outlined[name]).max(axis=2) > 60).sum() for name in slides}
    assert changed["abnormal_0"] == 0
    assert changed["abnormal_1"] > 200


def test_excluded_areas_are_outlined_in_green(write_run: WriteRun, tmp_path: Path) -> None:
    """Also within what is abnormal, of which they are no part then."""
    slides = cohort(0, abnormal=2)
    run, files = write_run("one", slides, lift=3.0), truth(tmp_path, slides)
    outline(files["annotations"] / "abnormal_0.geojson", ("Tumor", SICK_PX), ("Hole", (224, 48, 288, 80)))
    drawn = pictures(run, files["annotations"], tmp_path / "drawn", groups={"Hole": "excluded"})
    green = {name: (np.abs(pixels - (0, 158, 115)).sum(axis=2) < 20).sum() for name, pixels in drawn.items()}
    assert green["abnormal_0"] > 500
    assert green["abnormal_1"] == 0
