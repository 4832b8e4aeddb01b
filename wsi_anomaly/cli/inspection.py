"""The commands that look and change nothing: detectors, pipelines, keywords, doctor, validate-geojson."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.markup import escape
from rich.table import Table

from wsi_anomaly.cli.console import stdout
from wsi_anomaly.cli.tables import print_listing
from wsi_anomaly.errors import PluginError


def detectors() -> None:
    """List the installed detectors: what each needs and gives, and where it comes from."""
    from wsi_anomaly.plugins import DETECTORS, installed, load_plugin

    rows: list[tuple[str, ...]] = []
    troubles = []
    for name, entry in installed(DETECTORS).items():
        package = entry.dist.name if entry.dist else _UNKNOWN
        try:
            rows.append((name, *_described(load_plugin(DETECTORS, name)), package))
        except PluginError as error:
            rows.append((name, *[_UNKNOWN] * 6, package))
            troubles.append(str(error))
    print_listing(("detector", "what it does", "needs", "outputs", "caution", "paper", "licences", "package"), rows)
    for trouble in troubles:
        stdout.print(trouble, markup=False, highlight=False, soft_wrap=True)


_UNKNOWN = "-"


def _described(detector: Any) -> tuple[str, ...]:  # noqa: ANN401 - any class that was registered
    """What it does, needs and gives, how it can mislead, its paper, licences. A plug-in may tell none of it."""
    summary = next(iter((detector.__doc__ or "").strip().splitlines()), _UNKNOWN)
    needs = getattr(detector, "needs", None)
    extra = [f"the extra {name}" for name in [getattr(detector, "extra", "")] if name]
    kinds = getattr(detector, "outputs", None)
    outputs = (", ".join(_score_names(detector)), *(_kinds_of_output(detector) if kinds is None else kinds))
    return (
        summary,
        _UNKNOWN if needs is None else ", ".join((*needs, *extra)) or "nothing",
        "; ".join(filter(None, outputs)) or _UNKNOWN,
        getattr(detector, "caution", _UNKNOWN),
        getattr(detector, "paper", _UNKNOWN),
        getattr(detector, "licence_of", _UNKNOWN),
    )


def _score_names(detector: Any) -> tuple[str, ...]:  # noqa: ANN401
    """By its default options, where it has any."""
    try:
        return tuple(detector().score_names)
    except (TypeError, ValueError, AttributeError):  # an option without a default
        return ()


def _kinds_of_output(detector: Any) -> Iterator[str]:  # noqa: ANN401
    """What its scorer can do beside scores, by the class that `load` is said to return, or by each of several."""
    try:
        scorer = get_type_hints(detector.load).get("return")
    except (AttributeError, NameError, TypeError):
        return
    for method, kind in (("score_map", "map"), ("reconstruct", "reconstruction")):
        can = [hasattr(each, method) for each in get_args(scorer) or (scorer,)]
        if any(can):
            yield kind if all(can) else f"{kind} (some)"


def pipelines(
    name: Annotated[str | None, typer.Argument(help="Print this preset with all its options instead.")] = None,
) -> None:
    """List the pipeline presets, or print one of them with every default written out."""
    from wsi_anomaly.pipeline import load_pipeline, preset_names

    if name is not None:
        import tomli_w

        from wsi_anomaly.storage.model import without_none

        table = without_none(load_pipeline(name).with_defaults().as_table())
        stdout.print(tomli_w.dumps(table), markup=False, highlight=False, soft_wrap=True)
        return
    listing = _table("pipeline", "detector", "what it does")
    for preset in preset_names():
        pipeline = load_pipeline(preset)
        listing.add_row(preset, pipeline.detector_name, escape(pipeline.description))
    stdout.print(listing)


def keywords(
    name: Annotated[
        str | None, typer.Argument(help="Check and print this list instead; the path of a .toml file for your own.")
    ] = None,
) -> None:
    """List the keyword lists, or check one of them and print its keywords."""
    from wsi_anomaly.prompts.keywords import keyword_list_names, load_keywords

    if name is not None:
        chosen = load_keywords(name)
        table = _table("keyword", "category", "side")
        for side, words in (("normal", chosen.normal), ("abnormal", chosen.abnormal)):
            for word in words:
                table.add_row(escape(word.text), word.category, side)
        stdout.print(table)
        for line in (f"Source: {chosen.source}", f"Note: {chosen.note}"):
            stdout.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    listing = _table("list", "organ", "normal", "abnormal", "source")
    for list_name in keyword_list_names():
        listed = load_keywords(list_name)
        counts = (str(len(listed.normal)), str(len(listed.abnormal)))
        listing.add_row(list_name, listed.organ, *counts, escape(listed.source))
    stdout.print(listing)


def doctor() -> None:
    """Check what is installed, what is missing, and what to do about it."""
    from wsi_anomaly.pipeline.doctor import examine

    findings = examine()
    table = _table("", "what", "found")
    for finding in findings:
        well = "[yellow]note[/]" if finding.remedy else "[green]ok[/]"
        mark = well if finding.well else "[bold red]no[/]"
        table.add_row(mark, finding.what, escape(finding.found))
    stdout.print(table)
    for finding in findings:
        if finding.remedy:
            stdout.print(f"{finding.what}: {finding.remedy}", markup=False, highlight=False, soft_wrap=True)
    if not all(finding.well for finding in findings):
        raise typer.Exit(1)


def validate_geojson(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=".geojson, .json, .geojson.gz of any tool.")],
) -> None:
    """Hold GeoJSON files against what QuPath can read, and name each feature at fault.

    Errors make QuPath reject the whole file; warnings lose something silently. Exit status 1 if there is an error.
    """
    from wsi_anomaly.reporting.geojson_contract import validate_geojson as validate

    rejected = False
    for file in files:
        report = validate(file)
        rejected |= bool(report.errors)
        verdict = "QuPath rejects it" if report.errors else "QuPath reads it"
        counts = f"{report.features:,} features, {report.errors:,} errors, {report.warnings:,} warnings"
        for line in (f"{file}: {counts}. {verdict}.", *(f"  {fault}" for fault in report.faults)):
            stdout.print(line, markup=False, highlight=False, soft_wrap=True)
    if rejected:
        raise typer.Exit(1)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
