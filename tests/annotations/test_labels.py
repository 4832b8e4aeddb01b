from pathlib import Path

import pytest

from wsi_anomaly.annotations import SlideLabel, read_slide_groups, read_slide_labels
from wsi_anomaly.annotations.labels import TruthRow, read_truth
from wsi_anomaly.errors import AnnotationError


def test_labels_are_read_in_letters_of_any_case(tmp_path: Path) -> None:
    """True is abnormal."""
    (tmp_path / "labels.csv").write_text(
        "slide_id;label\na;Normal\nb;ABNORMAL\nc;0\nd;1\ne;tumor\n\nf;Tumour\n", encoding="utf-8-sig"
    )
    expected = {"a": False, "b": True, "c": False, "d": True, "e": True, "f": True}
    assert {name: label.abnormal for name, label in read_slide_labels(tmp_path / "labels.csv").items()} == expected


def test_all_faulty_labels_are_listed_at_once_by_row_number(tmp_path: Path) -> None:
    """A label that is misread would turn a measurement round."""
    (tmp_path / "labels.csv").write_text("label,slide_id\nnormal,a\nbenign,b\n\n1,a\n0,\n,c\n", encoding="utf-8")
    with pytest.raises(AnnotationError) as caught:
        read_slide_labels(tmp_path / "labels.csv")
    known = "normal, 0, abnormal, tumor, tumour, 1, negative, positive, macro, micro, itc"
    assert str(caught.value).splitlines() == [
        "labels.csv has faults; mend them and run again:",
        f"  row 3: label 'benign' is none of {known}",
        "  row 5: 'a' is there already",
        "  row 6: slide_id is empty",
        f"  row 7: label '' is none of {known}",
    ]


@pytest.mark.parametrize("content", [b"", b"slide_id\na\n", b"slide_id,class\na,normal\n", b"\xff\xfe"])
def test_a_table_that_holds_no_labels_is_refused(tmp_path: Path, content: bytes) -> None:
    """By name, with the columns it should have."""
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(AnnotationError, match=r"^labels\.csv: "):
        read_slide_labels(tmp_path / "labels.csv")


def test_a_table_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    """Without the folders above it."""
    with pytest.raises(AnnotationError, match=r"^nowhere\.csv: "):
        read_slide_labels(tmp_path / "nowhere.csv")


def test_a_metastasis_has_a_size(tmp_path: Path) -> None:
    """Of macro, micro and isolated tumour cells all are abnormal; Camelyon17 calls normal slides negative."""
    (tmp_path / "labels.csv").write_text("slide_id,label\na,Macro\nb,micro\nc,ITC\nd,negative\ne,tumor\n")
    assert read_slide_labels(tmp_path / "labels.csv") == {
        "a": SlideLabel(abnormal=True, subgroup="macro"),
        "b": SlideLabel(abnormal=True, subgroup="micro"),
        "c": SlideLabel(abnormal=True, subgroup="itc"),
        "d": SlideLabel(abnormal=False),
        "e": SlideLabel(abnormal=True),
    }


def test_a_table_may_name_annotations_beside_labels_or_alone(tmp_path: Path) -> None:
    """Relative to the table; either may be empty where both have a column. A table of slides will do."""
    (tmp_path / "outlines").mkdir()
    outline = tmp_path / "outlines" / "a.xml"
    outline.touch()
    table = tmp_path / "truth.csv"
    table.write_text("slide_id,path,mpp,annotation,label\na,a.svs,0.5,outlines/a.xml,\nb,b.svs,,,normal\nc,c.svs,,,\n")
    assert read_truth(table) == {
        "a": TruthRow(outline, None),
        "b": TruthRow(None, SlideLabel(abnormal=False)),
        "c": TruthRow(None, None),
    }
    assert not read_slide_labels(table)["b"].abnormal
    table.write_text("slide_id,annotation\na,outlines/a.xml\n")
    assert read_truth(table) == {"a": TruthRow(outline, None)}
    with pytest.raises(AnnotationError, match=r"^truth\.csv: has no labels"):
        read_slide_labels(table)


def test_faulty_rows_of_annotations_are_listed_too(tmp_path: Path) -> None:
    """Files that are not there, and a comma too many."""
    (tmp_path / "truth.csv").write_text(f"slide_id,annotation\na,b/nowhere.xml\nb,{tmp_path}/away.xml\nc,,x\n")
    with pytest.raises(AnnotationError) as caught:
        read_truth(tmp_path / "truth.csv")
    assert str(caught.value).splitlines()[1:] == [
        "  row 2: annotation 'b/nowhere.xml' is no file",
        "  row 3: annotation 'away.xml' is no file",
        "  row 4: 3 cells in 2 columns",
    ]


def test_a_misspelt_column_is_refused_with_the_nearest(tmp_path: Path) -> None:
    """To leave it out silently would leave the annotations out."""
    (tmp_path / "truth.csv").write_text("slide_id,anotation\na,a.xml\n")
    with pytest.raises(AnnotationError, match=r"unknown column 'anotation' .*did you mean 'annotation'"):
        read_truth(tmp_path / "truth.csv")
    (tmp_path / "truth.csv").write_text("slide_id,label,label\na,normal,normal\n")
    with pytest.raises(AnnotationError, match="each once"):
        read_truth(tmp_path / "truth.csv")


def test_any_text_is_a_group(tmp_path: Path) -> None:
    """Spelt as it stands there first; slides without one are left out, other columns are not read."""
    table = tmp_path / "sites.csv"
    table.write_text("path;Slide_ID;label\nx;a;Site  Ä\ny;b;site ä\n;c;\n;d;9\n", "utf-8")
    assert read_slide_groups(table) == {"a": "Site Ä", "b": "Site Ä", "d": "9"}


def test_columns_that_are_said_not_to_be_read_may_stand_there(tmp_path: Path) -> None:
    """Those of the cohort's table that the detector looked at; no others."""
    table = tmp_path / "cohort.csv"
    table.write_text("path,slide_id,scanner,label\na.tif,a,Aperio,normal\n")
    assert set(read_truth(table, not_read=("Scanner",))) == set(read_slide_labels(table, not_read=["Scanner"])) == {"a"}
    with pytest.raises(AnnotationError, match="unknown column 'scanner'"):
        read_truth(table)
