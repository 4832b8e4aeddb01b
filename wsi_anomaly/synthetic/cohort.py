"""Write one made-up slide or a folder of them with labels and outlines: what the demo and the tests start from."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from wsi_anomaly.synthetic.anomalies import Anomaly, AnomalyKind, write_annotations
from wsi_anomaly.synthetic.pyramid import TILE_PX, write_pyramid_from_tiles
from wsi_anomaly.synthetic.slide import VirtualSlide, draw_region, draw_slide

_SICK: tuple[tuple[AnomalyKind, ...], ...] = (("metastasis",), ("necrosis",), ("metastasis", "necrosis"))


@dataclass(frozen=True, slots=True)
class Cohort:
    """Where `write_cohort` left what it wrote."""

    normal_slides: tuple[Path, ...]
    """To learn from."""
    test_slides: tuple[Path, ...]
    """Normal ones first, then those with anomalies."""
    annotations: Path
    """A folder with `<slide_id>.geojson` for each test slide that has anomalies."""
    labels: Path
    """A CSV of test slides: `slide_id,label`, the label is `normal` or `abnormal`."""


def write_slide(
    path: Path,
    *,
    seed: int,
    size_px: tuple[int, int] = (4096, 4096),
    mpp: float = 0.5,
    anomalies: Sequence[AnomalyKind] = (),
    varied: bool = False,
) -> tuple[Anomaly, ...]:
    """Write one slide of a lymph node, and say which anomalies were planted where.

    The same seed gives the same bytes. Cells are drawn for 0.5 µm a pixel; `mpp` is only what the file says. `varied`
    as in `draw_slide`.
    """
    slide = draw_slide(seed, size_px=size_px, anomalies=anomalies, varied=varied)
    write_virtual_slide(path, slide, mpp=mpp)
    return slide.anomalies


def write_virtual_slide(path: Path, slide: VirtualSlide, *, mpp: float = 0.5) -> None:
    """Write all pixels of a slide that so far was only decided on. `mpp` is only what the file says."""
    write_pyramid_from_tiles(path, _tiles(slide), size_px=slide.size_px, mpp=mpp)


def _tiles(slide: VirtualSlide) -> Iterator[UInt8[np.ndarray, "row column rgb"]]:
    """The tiles of the pyramid's base, row by row, drawn a row at a time: what lies between tiles is drawn once."""
    width, height = slide.size_px
    for top in range(0, height, TILE_PX):
        strip = draw_region(slide, (0, top), (width, min(TILE_PX, height - top)))
        for left in range(0, width, TILE_PX):
            yield strip[:, left : left + TILE_PX]


def write_cohort(
    folder: Path,
    *,
    seed: int = 0,
    size_px: tuple[int, int] = (4096, 4096),
    normal_slides: int = 4,
    normal_test_slides: int = 2,
    abnormal_test_slides: int = 2,
    varied: bool = False,
) -> Cohort:
    """Write slides to learn from and slides to test on, with the labels and outlines of the latter.

    Leaves `normal/`, `test/`, `annotations/` and `labels.csv` in `folder`. Abnormal slides have, in turn, a metastasis,
    a necrosis, both. `varied`: each slide of any stain, scanner and grade of tumour.
    """
    for name in ("normal", "test", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    normal = [folder / "normal" / f"normal_{number:02}.tif" for number in range(1, normal_slides + 1)]
    test = [
        folder / "test" / f"test_{number:02}.tif" for number in range(1, normal_test_slides + abnormal_test_slides + 1)
    ]
    sick = [()] * (normal_slides + normal_test_slides) + list(islice(cycle(_SICK), abnormal_test_slides))
    for number, (path, kinds) in enumerate(zip(normal + test, sick, strict=True)):
        planted = write_slide(path, seed=1000 * seed + number, size_px=size_px, anomalies=kinds, varied=varied)
        if planted:
            write_annotations(folder / "annotations" / f"{path.stem}.geojson", planted)
    labels = folder / "labels.csv"
    _write_labels(labels, test, ["normal"] * normal_test_slides + ["abnormal"] * abnormal_test_slides)
    return Cohort(tuple(normal), tuple(test), folder / "annotations", labels)


def _write_labels(path: Path, slides: Sequence[Path], labels: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "label"])
        writer.writerows((slide.stem, label) for slide, label in zip(slides, labels, strict=True))
