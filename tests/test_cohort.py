from pathlib import Path

import pytest

from wsi_anomaly.cohort import CohortSlide, read_cohort
from wsi_anomaly.errors import CohortError


def touch(folder: Path, *names: str) -> None:
    """Leave empty files of these names in the folder: a cohort is made without opening slides."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def table(folder: Path, text: str, *, encoding: str = "utf-8") -> Path:
    """A CSV in the folder."""
    path = folder / "cohort.csv"
    path.write_text(text, encoding=encoding)
    return path


def ids(*sources: Path) -> list[str]:
    """The names of the slides that the sources hold."""
    return [slide.slide_id for slide in read_cohort(sources)]


def message(*sources: Path) -> str:
    """What the user is told of sources that cannot be used."""
    with pytest.raises(CohortError) as caught:
        read_cohort(sources)
    return str(caught.value)


def dicom(path: Path, series: str) -> None:
    """A DICOM header without pixels."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SeriesInstanceUID = series
    dataset.save_as(path)


# Folders and files


def test_a_folder_is_searched_recursively_and_listed_in_order(tmp_path: Path) -> None:
    """Known suffixes count in any case of letters; other files are passed over."""
    touch(tmp_path, "b.SVS", "a.tif", "deep/er/c.mrxs", "deep/er/c/Slidedat.ini", "notes.txt", "overview.png")
    assert ids(tmp_path) == ["a", "b", "c"]


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    """Systems such as macOS leave a `._` shadow of each file on foreign disks."""
    touch(tmp_path, "a.svs", "._a.svs", ".trash/b.svs")
    assert ids(tmp_path) == ["a"]


def test_links_are_followed_once_and_never_in_circles(tmp_path: Path) -> None:
    """A folder that is linked from elsewhere and from within itself gives each slide once."""
    touch(tmp_path, "disk/a.svs", "cohort/b.svs")
    (tmp_path / "cohort" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "cohort" / "again").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "cohort")
    assert sorted(ids(tmp_path / "cohort")) == ["a", "b"]


def test_a_file_named_twice_is_one_slide(tmp_path: Path) -> None:
    """By its folder and by itself."""
    touch(tmp_path, "a.svs", "b.svs")
    assert ids(tmp_path, tmp_path / "a.svs", tmp_path / "." / "b.svs") == ["a", "b"]


def test_a_named_file_needs_no_known_suffix(tmp_path: Path) -> None:
    """Whoever names a file knows what it is."""
    touch(tmp_path, "scan.001")
    assert read_cohort([tmp_path / "scan.001"]) == (CohortSlide("scan", tmp_path / "scan.001"),)


def test_an_empty_folder_is_refused_with_the_suffixes_and_without_the_folders_above(tmp_path: Path) -> None:
    """The folders above may be named after patients."""
    touch(tmp_path, "jane doe/slides/readme.txt")
    text = message(tmp_path / "jane doe" / "slides")
    assert text.startswith("slides: no slides in this folder")
    assert ".ndpi" in text
    assert "jane doe" not in text


def test_a_folder_with_nothing_but_a_table_is_not_guessed_at(tmp_path: Path) -> None:
    """The message says which table could be named instead."""
    touch(tmp_path, "lists/cohort.csv")
    assert str(Path("lists/cohort.csv")) in message(tmp_path)


def test_a_source_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    """Whatever its suffix."""
    assert message(tmp_path / "slidez") == "slidez: no such file or folder"
    assert message(tmp_path / "cohort.csv") == "cohort.csv: no such file or folder"


def test_no_source_is_no_cohort() -> None:
    """An empty list is refused, not run."""
    assert "no slides" in message()


# Names


@pytest.mark.parametrize(
    ("file_name", "slide_id"),
    [
        ("x.ome.tiff", "x"),
        ("x.OME.TIF", "x"),
        ("fluorescence 2 (560).ndpi", "fluorescence 2 (560)"),
        ("2024-01.12 A.svs", "2024-01.12 A"),
        ("a:b\\c\td.svs", "a_b_c_d"),
        ("...svs", "slide"),
        ("Größe.svs", "Größe"),
    ],
)
def test_a_slide_is_called_after_its_file_made_safe_for_a_folder(tmp_path: Path, file_name: str, slide_id: str) -> None:
    """Blanks and parentheses stay; separators, control characters and leading dots go."""
    touch(tmp_path, file_name)
    assert ids(tmp_path / file_name) == [slide_id]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    """Also where only the case of letters differs; names that are unique stay short."""
    touch(tmp_path, "a/x.svs", "b/X.svs", "b/y.svs")
    assert ids(tmp_path) == ["a__x", "b__X", "y"]


def test_files_of_two_folders_named_apart_are_told_apart_too(tmp_path: Path) -> None:
    """The path is relative to what all sources have in common."""
    touch(tmp_path, "one/in/x.svs", "two/in/x.svs")
    assert ids(tmp_path / "one", tmp_path / "two") == ["one__in__x", "two__in__x"]


def test_files_of_one_name_and_folder_are_told_apart_by_their_suffix(tmp_path: Path) -> None:
    """Neither overwrites the output of the other."""
    touch(tmp_path, "x.svs", "x.tif")
    assert ids(tmp_path) == ["x.svs", "x.tif"]


def test_names_that_clash_whatever_is_done_are_refused(tmp_path: Path) -> None:
    """The remedy is a table."""
    touch(tmp_path, "a__x.svs", "a/x.svs", "b/x.svs")
    text = message(tmp_path)
    assert "a__x.svs" in text
    assert "CSV" in text


# DICOM


def test_dicom_files_of_one_series_in_one_folder_are_one_slide(tmp_path: Path) -> None:
    """Each level of a DICOM slide is a file of its own."""
    (tmp_path / "other").mkdir()
    dicom(tmp_path / "level0.dcm", "1.2.3")
    dicom(tmp_path / "level1.dcm", "1.2.3")
    dicom(tmp_path / "second.dcm", "1.2.4")
    dicom(tmp_path / "other" / "copy.dcm", "1.2.3")
    assert ids(tmp_path) == ["level0", "copy", "second"]


def test_dicom_files_without_a_readable_header_are_listed_each_by_itself(tmp_path: Path) -> None:
    """They fail when they are opened, where the reason can be told."""
    touch(tmp_path, "a.dcm", "b.dcm")
    (tmp_path / "c.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 50)
    assert ids(tmp_path) == ["a", "b", "c"]


# Tables


def test_a_table_says_everything_about_a_slide(tmp_path: Path) -> None:
    """Its paths are relative to the table."""
    touch(tmp_path, "slides/a.svs", "a.geojson", "a.png")
    path = table(tmp_path, "slide_id,path,mpp,split,annotation,mask\nA 1,slides/a.svs,0.25,reference,a.geojson,a.png\n")
    expected = CohortSlide(
        slide_id="A 1",
        path=tmp_path / "slides" / "a.svs",
        mpp=0.25,
        split="reference",
        annotation=tmp_path / "a.geojson",
        mask=tmp_path / "a.png",
    )
    assert read_cohort([path]) == (expected,)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_is_read_as_spreadsheets_of_any_country_write_it(tmp_path: Path, delimiter: str, encoding: str) -> None:
    """With or without byte order mark, blanks, empty rows and empty cells at the end."""
    touch(tmp_path, "ä.svs", "b.svs")
    rows = [["Path ", " mpp", ""], ["ä.svs", "0.5", ""], ["", "", ""], ["b.svs", "", ""]]
    path = table(tmp_path, "\r\n".join(delimiter.join(row) for row in rows), encoding=encoding)
    assert read_cohort([path]) == (CohortSlide("ä", tmp_path / "ä.svs", 0.5), CohortSlide("b", tmp_path / "b.svs"))


def test_a_table_without_slide_ids_names_slides_as_a_folder_does(tmp_path: Path) -> None:
    """The stem, and the folders where stems clash; a slide_id that is given stays what it is."""
    touch(tmp_path, "a/x.svs", "b/x.svs", "c/y.svs", "d/y.svs")
    path = table(tmp_path, "slide_id,path\n,a/x.svs\n,b/x.svs\ny,c/y.svs\n,d/y.svs\n")
    assert ids(path) == ["a__x", "b__x", "y", "d__y"]


def test_all_faulty_rows_are_listed_at_once_by_row_number(tmp_path: Path) -> None:
    """The numbers are those that a spreadsheet shows: the header is row 1, empty rows count."""
    touch(tmp_path, "a.svs")
    path = table(
        tmp_path,
        "slide_id,path,mpp,split,mask\n"
        "one,a.svs,0.5,train,\n"
        "\n"
        "two,a.svs,fine,,\n"
        "three,a.svs,,training,\n"
        "ONE,a.svs,,,\n"
        "four,missing.svs,-1,,mask.png\n"
        "five,,,,\n"
        "si/x,a.svs,,,\n"
        "seven,a.svs,nan,,,more\n"
        "eight,a.svs,inf,,\n",
    )
    assert message(path).splitlines() == [
        "cohort.csv has faults; mend them and run again:",
        "  row 4: mpp 'fine' is no size of a pixel; give microns per pixel from 0.01 to 100, such as 0.25",
        "  row 5: split 'training' is none of train, reference, test",
        "  row 6: slide_id 'ONE' is the one of row 2",
        "  row 7: path 'missing.svs' is no file",
        "  row 7: mask 'mask.png' is no file",
        "  row 7: mpp '-1' is no size of a pixel; give microns per pixel from 0.01 to 100, such as 0.25",
        "  row 8: path is empty",
        "  row 9: slide_id 'si/x' is no name for a folder; use 'si_x'",
        "  row 10: 6 cells in 5 columns",
        "  row 11: mpp 'inf' is no size of a pixel; give microns per pixel from 0.01 to 100, such as 0.25",
    ]


def test_an_absolute_path_that_does_not_exist_is_told_by_its_name(tmp_path: Path) -> None:
    """The folders above may be named after patients."""
    text = message(table(tmp_path, f"path\n{tmp_path / 'jane doe' / 'a.svs'}\n"))
    assert "'a.svs'" in text
    assert "jane" not in text


def test_an_unknown_column_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    """A misspelt column would otherwise be ignored in silence."""
    assert "unknown column 'anotation' (did you mean 'annotation'?)" in message(table(tmp_path, "path,anotation\n"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("slide_id,mpp\na,1\n", "the column path is missing"),
        ("path,path\n", "column 'path' is there twice"),
        ("path\n", "no slides in this table"),
        ("", "the column path is missing"),
        ('path\n"a.svs', "not a CSV table"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    """Each with its reason."""
    assert fault in message(table(tmp_path, text))


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    """Wrong letters in a slide_id would be worse."""
    assert "not UTF-8" in message(table(tmp_path, "path\nä.svs\n", encoding="latin-1"))


def test_what_a_table_says_of_a_slide_holds_where_a_folder_names_it_too(tmp_path: Path) -> None:
    """The slide is listed once, as the table has it."""
    touch(tmp_path, "a.svs", "b.svs")
    path = table(tmp_path, "slide_id,path,mpp\nA,a.svs,0.5\n")
    assert read_cohort([tmp_path, path]) == (
        CohortSlide("A", tmp_path / "a.svs", 0.5),
        CohortSlide("b", tmp_path / "b.svs"),
    )


def test_two_tables_with_one_slide_id_are_refused(tmp_path: Path) -> None:
    """Neither overwrites the output of the other."""
    touch(tmp_path, "one/a.svs", "two/b.svs")
    tables = [table(tmp_path / "one", "slide_id,path\nx,a.svs\n"), table(tmp_path / "two", "slide_id,path\nX,b.svs\n")]
    assert "a.svs (x), b.svs (X)" in message(*tables)


def test_the_default_mpp_is_for_slides_without_their_own(tmp_path: Path) -> None:
    """The table is more exact than the command line."""
    touch(tmp_path, "a.svs", "b.svs")
    path = table(tmp_path, "path,mpp\na.svs,0.5\nb.svs,\n")
    assert [slide.mpp for slide in read_cohort([path], mpp=0.25)] == [0.5, 0.25]


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan")])
def test_a_default_mpp_that_is_no_length_is_refused(tmp_path: Path, mpp: float) -> None:
    """Before any slide is looked for."""
    with pytest.raises(CohortError, match=r"microns per pixel from 0\.01 to 100"):
        read_cohort([tmp_path], mpp=mpp)


# Real slides


def test_the_folder_of_real_slides_is_a_cohort_of_six(shared_data: Path) -> None:
    """The table beside the slides is not a slide; the broken one is listed, to fail by itself."""
    assert ids(shared_data / "slides") == [
        "broken",
        "camelyon_overview",
        "cmu-1-small-region",
        "fluorescence 2 (560)",
        "kidney-48-5",
        "tcga-cr-7395-01a-01-ts1",
    ]


def test_the_table_of_real_slides_is_a_cohort_of_three(shared_data: Path) -> None:
    """With its own names, and mpp where the files have none."""
    slides = read_cohort([shared_data / "slides" / "cohort.csv"])
    assert [(slide.slide_id, slide.mpp) for slide in slides] == [
        ("cmu-1", None),
        ("tcga-cr-7395", 0.5),
        ("kidney-48-5", 0.5),
    ]
    assert all(slide.path.is_file() for slide in slides)
