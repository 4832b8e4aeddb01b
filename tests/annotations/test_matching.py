from pathlib import Path

import pytest

from wsi_anomaly.annotations import SlideLabel, find_annotations
from wsi_anomaly.errors import AnnotationError


def touched(folder: Path, *names: str) -> None:
    """Empty files of these names."""
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize(
    "name",
    [
        "tumor_001.xml",
        "Tumor_001.XML",
        "tumor_001.json",
        "tumor_001.geojson",
        "tumor_001.geojson.gz",
        "tumor_001.svs.geojson",
        "tumor_001.png",
        "tumor_001.tiff",
        "tumor_001.ome.tif",
        "tumor_001_mask.tif",
        "Tumor_001_Mask.tif",
        "tumor_001_evaluation_mask.png",
        "tumor_001-annotations.geojson",
        "mask_tumor_001.jpg",
        "mask.tumor_001.tif.jpg",
    ],
)
def test_files_are_found_by_the_slide_they_are_named_after(tmp_path: Path, name: str) -> None:
    """In letters of any case, with a word around the name or the suffix of the slide in it."""
    touched(tmp_path, name, ".DS_Store", "._tumor_001.xml", "README.md")
    (tmp_path / "normal_001.xml").mkdir()
    matched = find_annotations(tmp_path, ["tumor_001", "normal_001"])
    assert matched.annotations == {"tumor_001": tmp_path / name, "normal_001": None}
    assert matched.labels == {"tumor_001": None, "normal_001": None}
    assert (matched.unmatched, matched.missing) == ((), ("normal_001",))


def test_files_of_no_slide_are_listed(tmp_path: Path) -> None:
    """A longer name is another slide, also where it begins alike."""
    touched(tmp_path, "tumor_001.xml", "tumor_0011.xml", "tumor_00.xml", "tumor_001_2.png", "out_tumor_001.jpg")
    matched = find_annotations(tmp_path, ["tumor_001"])
    assert matched.unmatched == ("out_tumor_001.jpg", "tumor_00.xml", "tumor_0011.xml", "tumor_001_2.png")


def test_a_slide_may_itself_be_called_mask(tmp_path: Path) -> None:
    """The whole name goes before what is left of it."""
    touched(tmp_path, "a_mask.png", "a.xml", "mask.xml")
    matched = find_annotations(tmp_path, ["a", "a_mask", "mask"])
    found = {slide_id: path.name for slide_id, path in matched.annotations.items() if path}
    assert found == {"a": "a.xml", "a_mask": "a_mask.png", "mask": "mask.xml"}


def test_several_files_for_one_slide_are_refused_by_name(tmp_path: Path) -> None:
    """To take either would be a guess."""
    touched(tmp_path, "a.xml", "A_mask.tif", "b.xml")
    with pytest.raises(AnnotationError, match=r"A_mask\.tif, a\.xml \(a\)"):
        find_annotations(tmp_path, ["a", "b"])


def test_a_table_gives_annotations_and_labels(tmp_path: Path) -> None:
    """Rows of no slide are listed; a slide with a label alone is not missing."""
    touched(tmp_path, "x.xml")
    table = tmp_path / "truth.csv"
    table.write_text("slide_id,annotation,label\na.tif,x.xml,macro\nB,,normal\nc,,\nz,x.xml,micro\n")
    matched = find_annotations(table, ["a", "b", "c", "d"])
    assert matched.annotations == {"a": tmp_path / "x.xml", "b": None, "c": None, "d": None}
    macro, normal = SlideLabel(abnormal=True, subgroup="macro"), SlideLabel(abnormal=False)
    assert matched.labels == {"a": macro, "b": normal, "c": None, "d": None}
    assert (matched.unmatched, matched.missing) == (("z",), ("c", "d"))


def test_several_rows_for_one_slide_are_refused(tmp_path: Path) -> None:
    """They may contradict each other."""
    (tmp_path / "truth.csv").write_text("slide_id,label\na,normal\nA.svs,abnormal\n")
    with pytest.raises(AnnotationError, match=r"^truth\.csv: several rows for the slide a"):
        find_annotations(tmp_path / "truth.csv", ["a"])


def test_a_place_with_nothing_for_any_slide_is_refused_with_what_it_has(tmp_path: Path) -> None:
    """Most likely the names differ, or the folder is the wrong one."""
    folder = tmp_path / "annotations"
    folder.mkdir()
    with pytest.raises(AnnotationError, match=r"^annotations: nothing .*\(a, b\).*\.xml"):
        find_annotations(folder, ["a", "b"])
    touched(folder, "x.xml")
    with pytest.raises(AnnotationError, match=r"^annotations: nothing .*\(a, b\)\. It has x\.xml"):
        find_annotations(folder, ["a", "b"])


@pytest.mark.parametrize("name", ["nowhere", "nowhere.csv", "a.xml"])
def test_a_place_that_is_neither_folder_nor_table_is_refused(tmp_path: Path, name: str) -> None:
    """By name."""
    touched(tmp_path, "a.xml")
    with pytest.raises(AnnotationError, match=rf"^{name}: no folder"):
        find_annotations(tmp_path / name, ["a"])
