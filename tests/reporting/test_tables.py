"""What the tables say, in Markdown and in LaTeX."""

import re
from functools import partial

import pytest

from wsi_anomaly.reporting import tables
from wsi_anomaly.reporting.tables import Cell, Row, Table

DASH = "\N{EN DASH}"
AWKWARD = r"50 % of $x_1^2$ & {a} #1 ~b \c"


to_markdown, to_latex = partial(tables.to_markdown, turned=False), partial(tables.to_latex, turned=False)


def table(*rows: Row, columns: tuple[tuple[str, ...], ...] = (("AUROC",), ("AUPR",))) -> Table:
    """Of two measures."""
    return Table(columns, rows, "Detection")


def row(name: str, *values: float | None, warning: str = "") -> Row:
    """Of plain figures."""
    return Row(name, tuple(map(Cell, values)), warning)


def markdown_cells(text: str) -> list[list[str]]:
    """What stands between the bars, without the rule."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [split[0], *split[2:]]


def latex_cells(text: str) -> list[list[str]]:
    """Of the lines of the tabular that hold any."""
    body = text.split(r"\toprule")[1].split(r"\bottomrule", maxsplit=1)[0]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)&", line.rsplit(r"\\", 1)[0])]
        for line in body.splitlines()
        if r"\\" in line
    ]


def test_figures_have_three_decimals() -> None:
    """Whatever their size."""
    values = (0.5, 0.99951, 0.0001, 1.0)
    columns = tuple((f"m{i}",) for i in range(len(values)))
    shown = ["0.500", "1.000", "0.000", "1.000"]
    assert markdown_cells(to_markdown(table(row("a", *values), columns=columns)))[1] == ["a", *shown]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_value_is_a_dash_that_is_explained(missing: float | None) -> None:
    """Without interval and p-value, and never the best."""
    given = table(Row("a", (Cell(missing, (0.1, 0.2), 0.5), Cell(0.6))), row("b", 0.7, 0.5))
    text = to_markdown(given)
    assert markdown_cells(text)[1] == ["a", DASH, "**0.600**"]
    assert f"- {DASH}: not available." in text
    assert latex_cells(to_latex(given, label="t"))[1] == ["a", "--", r"\textbf{0.600}"]
    assert "not available" not in to_markdown(table(row("a", 0.1, 0.2)))


def test_the_best_of_each_measure_is_bold() -> None:
    """In both languages."""
    given = table(row("a", 0.9, 0.1), row("b", 0.8, 0.3))
    assert markdown_cells(to_markdown(given))[1:] == [["a", "**0.900**", "0.100"], ["b", "0.800", "**0.300**"]]
    assert latex_cells(to_latex(given, label="t"))[1:] == [
        ["a", r"\textbf{0.900}", "0.100"],
        ["b", "0.800", r"\textbf{0.300}"],
    ]


def test_equal_figures_as_printed_are_equally_bold() -> None:
    """What cannot be read off the table does not decide."""
    given = table(row("a", 0.90001, 0.1), row("b", 0.89999, 0.3), row("c", 0.88, 0.3))
    assert [line[1:] for line in markdown_cells(to_markdown(given))[1:]] == [
        ["**0.900**", "0.100"],
        ["**0.900**", "**0.300**"],
        ["0.880", "**0.300**"],
    ]


def test_a_detector_alone_is_not_the_best() -> None:
    """There is nothing to compare it with."""
    given = table(row("a", 0.9, 0.3), row("b", None, None))
    assert "**" not in to_markdown(given)
    assert "textbf" not in to_latex(given, label="t")


def test_a_warning_stands_at_the_name_and_in_a_footnote() -> None:
    """And takes all values of the detector out of the race: one that calls everything abnormal must not look fine."""
    given = table(row("a", 1.0, 0.9, warning="20 % NaN"), row("b", 0.7, 0.3), row("c", 0.6, 0.4))
    text, latex = to_markdown(given), to_latex(given, label="t")
    assert markdown_cells(text)[1:] == [
        ["a†", "1.000", "0.900"],
        ["b", "**0.700**", "0.300"],
        ["c", "0.600", "**0.400**"],
    ]
    assert "- † 20 % NaN" in text
    assert "of those without a warning" in text
    assert latex_cells(latex)[1][0] == r"a\textsuperscript{\textdagger{}}"
    assert r"\textdagger{} 20 \% NaN\par" in latex


def test_equal_warnings_share_a_mark_and_many_are_told_apart() -> None:
    """In reading order."""
    rows = [row(f"d{i}", 0.5, 0.5, warning=f"warning {i % 6}") for i in range(12)]
    names = [line[0] for line in markdown_cells(to_markdown(table(*rows)))[1:]]
    assert [name.lstrip("d0123456789") for name in names] == ["†", "‡", "§", "¶", "††", "‡‡"] * 2


def test_intervals_and_p_values_follow_their_value() -> None:
    """Beside it in Markdown, in smaller lines below in LaTeX."""
    first = Row("a", (Cell(0.5, (0.25, 0.75)), Cell(0.3)))
    given = table(first, Row("b", (Cell(0.4, (0.15, 0.65), 0.0313), Cell(0.2, p_value=0.0004))))
    assert markdown_cells(to_markdown(given))[1:] == [
        ["a", f"**0.500** (0.250{DASH}0.750)", "**0.300**"],
        ["b", f"0.400 (0.150{DASH}0.650), p = 0.031", r"0.200, p < 0.001"],
    ]
    assert latex_cells(to_latex(given, label="t"))[1:] == [
        ["a", r"\textbf{0.500}", r"\textbf{0.300}"],
        ["", r"{\scriptsize (0.250--0.750)}", ""],
        ["b", "0.400", "0.200"],
        ["", r"{\scriptsize (0.150--0.650)}", ""],
        ["", r"{\scriptsize p = 0.031}", r"{\scriptsize p \textless{} 0.001}"],
    ]
    assert to_latex(given, label="t").count("[2pt]") == 2
    assert "scriptsize" not in to_latex(table(row("a", 0.1, 0.2)), label="t")


def test_markdown_is_aligned_as_plain_text() -> None:
    """Every bar stands below the one above, also with letters of double width."""
    given = table(Row("滤泡", (Cell(0.5, (0.25, 0.75)), Cell(None))), row("a long name", 0.123, 1.0))
    lines = [line.replace("滤泡", "....") for line in to_markdown(given).splitlines() if line.startswith("|")]
    assert len({tuple(i for i, one in enumerate(line) if one == "|") for line in lines}) == 1
    assert set(lines[1]) == set("|-: ")
    assert lines[1].count(":") == 2


def test_the_parts_of_markdown_are_apart() -> None:
    """Caption, table, warnings, then notes, and a line break at the end."""
    given = Table(table().columns, (row("a", 0.5, None, warning="w"),), "Detection", ("first", "second"))
    caption, body, notes = to_markdown(given).split("\n\n")
    assert caption == "Detection"
    assert len(body.splitlines()) == 3
    assert notes == f"- † w\n- first\n- second\n- {DASH}: not available.\n"


def test_what_means_something_to_markdown_is_escaped() -> None:
    """And the rest stays readable: no backslash within Z_MAX or H&E."""
    given = Table((("Z_MAX",),), (row("a|b *c* _d_ `e` <f> [g] $h$", 0.5),), "H&E &amp; more\nat 5 %")
    text = to_markdown(given)
    assert markdown_cells(text) == [["Detector", "Z_MAX"], [r"a\|b \*c\* \_d\_ \`e\` \<f> \[g\] \$h\$", "0.500"]]
    assert text.startswith(r"H&E \&amp; more at 5 %")


def test_what_means_something_to_latex_is_escaped() -> None:
    """In names, heads, captions, notes and warnings."""
    given = Table(((AWKWARD,),), (row(AWKWARD, 0.5, warning=AWKWARD),), AWKWARD, (AWKWARD,))
    escaped = r"50 \% of \$x\_1\textasciicircum{}2\$ \& \{a\} \#1 \textasciitilde{}b \textbackslash{}c"  # by hand
    text = to_latex(given, label="t")
    assert text.count(escaped) == 5
    assert text.count("50 ") == 5


def test_latex_shows_signs_as_they_are_meant() -> None:
    """Two hyphens of an option are no dash; a bracket after a line break is no length."""
    given = Table(
        (("n",),), (row("[x]", 0.1), row("*", 0.2)), f"--protocol z ≥ 0, \N{MINUS SIGN}1 {DASH} 2 <a>", ("a\n\nb",)
    )
    text = to_latex(given, label="t")
    assert r"\caption{-{}-protocol z $\ge$ 0, $-$1 -- 2 \textless{}a\textgreater{}}" in text
    assert "\n{[}x{]} & 0.100 \\\\\n{*} & \\textbf{0.200} \\\\\n" in text
    assert r"a b\par" in text


def grouped() -> Table:
    """Two data sets, one of them with two levels."""
    heads = (("LN", "Tile", "AUC"), ("LN", "Tile", "AUPR"), ("C16", "Tile", "AUC"), ("C16", "Slide", "AUC"), ("n",))
    rows = (row("a", 0.1, 0.2, 0.3, 0.4, 0.5), row("b", 0.2, 0.1, 0.4, 0.3, 0.6))
    return Table(heads, rows, "Two sets")


def test_heads_of_neighbours_are_joined_in_latex() -> None:
    """Over a rule each; a measure without a group has none."""
    lines = to_latex(grouped(), label="t").splitlines()
    start = lines.index(r"\toprule")
    assert lines[start - 1] == r"\begin{tabular}{lrrrrr}"
    assert lines[start + 1 : start + 6] == [
        r" & \multicolumn{2}{c}{LN} & \multicolumn{2}{c}{C16} & \multicolumn{1}{c}{} \\",
        r"\cmidrule(lr){2-3}\cmidrule(lr){4-5}",
        r" & \multicolumn{2}{c}{Tile} & \multicolumn{1}{c}{Tile} & \multicolumn{1}{c}{Slide} & \multicolumn{1}{c}{} \\",
        r"\cmidrule(lr){2-3}\cmidrule(lr){4-4}\cmidrule(lr){5-5}",
        r"Detector & AUC & AUPR & AUC & AUC & n \\",
    ]


def test_heads_are_written_out_in_markdown() -> None:
    """Its tables have one line of them."""
    heads = markdown_cells(to_markdown(grouped()))[0]
    assert heads == ["Detector", "LN · Tile · AUC", "LN · Tile · AUPR", "C16 · Tile · AUC", "C16 · Slide · AUC", "n"]


def test_a_turned_table_has_detectors_in_columns() -> None:
    """And the same figures, the same ones bold."""
    upright, turned = (markdown_cells(tables.to_markdown(grouped(), turned=one)) for one in (False, True))
    assert [list(line) for line in zip(*turned, strict=True)] == [["Measure", *upright[0][1:]], *upright[1:]]
    lines = latex_cells(tables.to_latex(grouped(), label="t", turned=True))
    assert lines == [
        ["", "", "", "a", "b"],
        ["LN", "Tile", "AUC", "0.100", r"\textbf{0.200}"],
        ["", "", "AUPR", r"\textbf{0.200}", "0.100"],
        ["C16", "Tile", "AUC", "0.300", r"\textbf{0.400}"],
        ["", "Slide", "AUC", r"\textbf{0.400}", "0.300"],
        ["", "", "n", "0.500", r"\textbf{0.600}"],
    ]


@pytest.mark.parametrize("layout", ["upright", "turned"])
def test_every_line_of_latex_has_as_many_cells(layout: str) -> None:
    """As the tabular declares, and every environment is closed."""
    cells = tuple(Cell(0.1 * i, (0.0, 1.0), 0.5 if i % 2 else None) for i in range(5))
    given = Table(grouped().columns, (Row("a", cells, "w"), Row("b", cells)), "Two sets", ("note",))
    text = tables.to_latex(given, label="tab:two", turned=layout == "turned")
    declared = len(re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)[0])
    for line in latex_cells(text):
        assert sum(int((re.match(r"\\multicolumn\{(\d+)\}", cell) or [0, "1"])[1]) for cell in line) == declared
    assert sorted(re.findall(r"\\begin\{(\w+)\}", text)) == sorted(re.findall(r"\\end\{(\w+)\}", text))
    assert text.count("{") == text.count("}")
    assert r"\label{tab:two}" in text


@pytest.mark.parametrize("layout", ["upright", "turned"])
def test_a_table_without_rows_is_a_table(layout: str) -> None:
    """Nothing could be evaluated."""
    turned = layout == "turned"
    assert markdown_cells(tables.to_markdown(table(), turned=turned)) == (
        [["Measure"], ["AUROC"], ["AUPR"]] if turned else [["Detector", "AUROC", "AUPR"]]
    )
    assert r"\bottomrule" in tables.to_latex(table(), label="t", turned=turned)


def test_a_row_of_another_length_is_refused() -> None:
    """A figure must not slide below the wrong head."""
    with pytest.raises(ValueError, match="row 'a': 1 cells for 2 columns"):
        table(row("a", 0.1))


def test_an_interval_without_width_is_not_shown() -> None:
    """It says nothing of how sure the value is, and would look as if it did."""

    def shown(interval: tuple[float, float]) -> str:
        return to_markdown(Table((("AUROC",),), (Row("a", (Cell(1.0, interval),)),), "Detection"), turned=False)

    assert "(" not in shown((1.0, 1.0))
    assert "(0.9" in shown((0.9, 1.0))
