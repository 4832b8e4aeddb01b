"""Stage `evaluate`: do findings agree with what people say? Reads heat maps, annotations, labels; writes measures."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsi_anomaly.annotations import Matched, Meaning, find_annotations, read_slide_labels
from wsi_anomaly.errors import AnnotationError, OptionsError
from wsi_anomaly.imaging.intervals import Comparison
from wsi_anomaly.stages.evaluate.evidence import Evidence, gather, mapped_slides, without_truth
from wsi_anomaly.stages.evaluate.measures import Findings, Measure, measure
from wsi_anomaly.stages.evaluate.outputs import write_outputs
from wsi_anomaly.stages.evaluate.protocol import Protocol, ProtocolName, choose_protocol
from wsi_anomaly.stages.evaluate.sanity import some_of
from wsi_anomaly.stages.evaluate.slide_level import compare
from wsi_anomaly.storage.arrays import read_attributes
from wsi_anomaly.storage.cohort_values import read_cohort_values
from wsi_anomaly.storage.layout import RunFolder
from wsi_anomaly.storage.record import writable, write_json
from wsi_anomaly.storage.tiles import TileStore

__all__ = ["Evaluation", "Findings", "Measure", "Protocol", "ProtocolName", "choose_protocol", "evaluate"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What each detector is worth, and how they compare with the first."""

    findings: Mapping[str, Findings]
    comparisons: Mapping[str, Mapping[str, Comparison]]
    """Of each further detector, by measure: that of the first one less its own."""
    folder: Path

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Those of the first detector."""
        return next(iter(self.findings.values())).measures


def evaluate(
    runs: Sequence[RunFolder],
    *,
    labels: Path | None = None,
    annotations: Path | None = None,
    protocol: Protocol | None = None,
    groups: Mapping[str, Meaning] | None = None,
    mask_values: frozenset[int] | None = None,
) -> Evaluation:
    """Compare what detectors found with labels and annotations; tables and figures lie in the first run's folder.

    `annotations` is a folder or a CSV (`find_annotations`), `labels` a CSV of labels, which come before those of the
    other; `groups` says what groups of outlines mean that are not known, `mask_values` which values of mask pictures
    are abnormal. `choose_protocol` makes a protocol other than the default. A detector is called by its name, or by its
    folder where two have the same.

    Raises:
        MissingOutputError: a run has no heat maps.
        AnnotationError: labels or annotations cannot be read, or none belongs to a slide; or tiles are of different
            sizes.
        OptionsError: a run is given twice.
        OutputError: the first run's folder cannot be written.
    """
    choices = protocol or choose_protocol()
    _require_equal_tiles(runs)
    slide_ids = list(dict.fromkeys(slide.slide_id for run in runs for slide in mapped_slides(run)))
    truth = _truth(slide_ids, labels, annotations, not_read=_cohort_columns(runs))
    evidence = {name: gather(run, truth, choices, groups or {}, mask_values) for name, run in _named(runs).items()}
    _tell(truth, evidence)
    findings = {name: measure(slides, choices) for name, slides in evidence.items()}
    first, *others = evidence
    comparisons = {name: compare(evidence[first], evidence[name], choices) for name in others}
    evaluation = Evaluation(findings, comparisons, runs[0].evaluation)
    with writable(runs[0].root):
        write_json(runs[0].metrics, _as_json(evaluation, choices, truth))
    write_outputs(runs[0].evaluation, evidence, findings, comparisons, choices)
    return evaluation


def _cohort_columns(runs: Sequence[RunFolder]) -> tuple[str, ...]:
    """What detectors looked at in the cohort's table, which may be the table of annotations or labels too."""
    slides = (slide for run in runs for slide in mapped_slides(run))
    return tuple(dict.fromkeys(name for slide in slides for name in read_cohort_values(slide.cohort_values)))


def _truth(
    slide_ids: Sequence[str], labels: Path | None, annotations: Path | None, *, not_read: Sequence[str]
) -> Matched:
    empty: dict[str, None] = dict.fromkeys(slide_ids)
    found = Matched(empty, empty, (), tuple(slide_ids))
    if annotations:
        found = find_annotations(annotations, slide_ids, not_read=not_read)
    if labels is None:
        return found
    table = read_slide_labels(labels, not_read=not_read)
    if not set(table) & set(slide_ids):
        raise AnnotationError(
            f"{labels.name}: none of its slide_ids ({', '.join(sorted(table)[:3])}, ...) is a slide of this run "
            f"({', '.join(sorted(slide_ids)[:3])}, ...). Use the slide_ids of slides.csv."
        )
    merged = {slide_id: table.get(slide_id, found.labels[slide_id]) for slide_id in slide_ids}
    unmatched = (*found.unmatched, *(name for name in table if name not in merged))
    missing = tuple(slide_id for slide_id in found.missing if slide_id not in table)
    return Matched(found.annotations, merged, unmatched, missing)


def _named(runs: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """By detector; where that is ambiguous by folder, with as many of the folders above it as tell them apart."""
    roots = [run.root.resolve() for run in runs]
    if twice := next((run.root for run, root in zip(runs, roots, strict=True) if roots.count(root) > 1), None):
        raise OptionsError(f"{twice}: given twice. Name each folder of results once.")
    names = [str(read_attributes(mapped_slides(run)[0].scores)["detector"]) for run in runs]
    depth = 0
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(root.parts[-depth:]) for root in roots]
    return dict(zip(names, runs, strict=True))


def _require_equal_tiles(runs: Sequence[RunFolder]) -> None:
    """Figures of tiles of different sizes cannot stand beside each other."""
    sizes = {}
    for run in runs:
        store = TileStore(mapped_slides(run)[0].tiles)
        sizes[run.root.name] = (store.tile_px, store.attributes["tile_mpp"])
    if len(set(sizes.values())) > 1:
        listed = "; ".join(f"{name}: {px} px at {mpp} µm/px" for name, (px, mpp) in sizes.items())
        raise AnnotationError(
            f"the results have tiles of different sizes ({listed}). Compare runs with the same tiles."
        )


def _tell(truth: Matched, evidence: Mapping[str, Sequence[Evidence]]) -> None:
    if truth.unmatched:
        log.warning("these belong to no slide of the run: %s", ", ".join(truth.unmatched))
    if truth.missing:
        log.warning("nobody said anything of these slides, they count as normal: %s", some_of(truth.missing))
    if excluded := without_truth(evidence):
        log.warning("abnormal without annotation, so at the slide level only: %s", ", ".join(excluded))


def _as_json(evaluation: Evaluation, protocol: Protocol, truth: Matched) -> dict[str, Any]:
    return {
        "protocol": protocol.model_dump(mode="json"),
        "detectors": {
            detector: {**found.measures, "intervals": dict(found.intervals), "warnings": list(found.warnings)}
            for detector, found in evaluation.findings.items()
        },
        "comparisons": {
            detector: {measured: asdict(test) for measured, test in tests.items()}
            for detector, tests in evaluation.comparisons.items()
        },
        "unmatched": list(truth.unmatched),
        "without_annotation_or_label": list(truth.missing),
    }
