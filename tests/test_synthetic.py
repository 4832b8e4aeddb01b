import csv
import json
from pathlib import Path

import numpy as np
import openslide
import pytest
import shapely
from scipy.ndimage import binary_closing, binary_opening

from wsi_anomaly.synthetic import (
    Anomaly,
    AnomalyKind,
    write_annotations,
    write_cohort,
    write_pyramid,
    write_pyramid_from_tiles,
    write_slide,
)

SIZE_PX = (1536, 1280)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[AnomalyKind, tuple[np.ndarray, Anomaly]]:
    """The pixels and the anomaly of one slide of each kind."""
    folder = tmp_path_factory.mktemp("planted")
    kinds: tuple[AnomalyKind, ...] = ("metastasis", "necrosis")
    slides = {}
    for kind in kinds:
        (anomaly,) = write_slide(folder / f"{kind}.tif", seed=5, size_px=SIZE_PX, anomalies=(kind,))
        slides[kind] = (pixels_of(folder / f"{kind}.tif"), anomaly)
    return slides


@pytest.fixture(scope="module")
def normal_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The node of the other fixture without an anomaly."""
    path = tmp_path_factory.mktemp("normal") / "normal.tif"
    assert write_slide(path, seed=5, size_px=SIZE_PX) == ()
    return path


def pixels_of(path: Path, level: int = 0) -> np.ndarray:
    """A whole level as RGB integers."""
    with openslide.OpenSlide(path) as slide:
        image = slide.read_region((0, 0), level, slide.level_dimensions[level])
    return np.asarray(image.convert("RGB")).astype(int)


def inside(anomaly: Anomaly, pixels: np.ndarray) -> np.ndarray:
    """The pixels within the outline."""
    rows, columns = np.indices(pixels.shape[:2])
    shapely.prepare(anomaly.outline_level0_px)
    return shapely.contains_xy(anomaly.outline_level0_px, columns + 0.5, rows + 0.5)


def test_openslide_reads_levels_and_microns_per_pixel(normal_slide: Path) -> None:
    """The file is a generic tiled TIFF whose levels halve."""
    with openslide.OpenSlide(normal_slide) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5)
        assert slide.level_dimensions == ((1536, 1280), (768, 640), (384, 320), (192, 160))
        assert slide.level_downsamples == pytest.approx((1, 2, 4, 8))


def test_a_seed_decides_every_byte(tmp_path: Path) -> None:
    """The same seed gives the same file, another seed another."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_slide(tmp_path / name, seed=seed, size_px=(512, 512), anomalies=("metastasis",))
    first, same, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == same
    assert first != other


def test_tissue_leaves_glass_free(normal_slide: Path) -> None:
    """Part of the slide is bright and grey, part is stained."""
    pixels = pixels_of(normal_slide, level=2)
    glass = pixels.min(axis=2) > 225
    assert 0.2 < glass.mean() < 0.7
    assert glass[:8, :8].all()


@pytest.mark.parametrize("kind", ["metastasis", "necrosis"])
def test_only_the_inside_of_the_outline_differs_from_the_normal_slide(
    kind: AnomalyKind, planted: dict[AnomalyKind, tuple[np.ndarray, Anomaly]], normal_slide: Path
) -> None:
    """The same seed without the anomaly gives the same tissue everywhere else."""
    pixels, anomaly = planted[kind]
    changed = np.abs(pixels - pixels_of(normal_slide)).max(axis=2) > 30
    within = inside(anomaly, pixels)
    # Whole cells are painted, so those on the line reach over it by less than their own width.
    beyond = ~inside(Anomaly(kind, anomaly.outline_level0_px.buffer(48)), pixels)
    assert changed[within].mean() > 0.6
    assert changed[beyond].mean() < 0.001


def test_nuclei_of_a_metastasis_are_larger(
    planted: dict[AnomalyKind, tuple[np.ndarray, Anomaly]], normal_slide: Path
) -> None:
    """Dark discs of 9 µm, wider than a lymphocyte, are common within the outline and rare in normal tissue."""
    pixels, anomaly = planted["metastasis"]
    within = inside(anomaly, pixels)
    assert opened_share(pixels, within) > 5 * opened_share(pixels_of(normal_slide), within)


def opened_share(pixels: np.ndarray, where: np.ndarray) -> float:
    """The share of pixels in dark discs too large for a lymphocyte."""
    dark = binary_closing(pixels[..., 0] < 120, iterations=1)
    y, x = np.ogrid[-9:10, -9:10]
    return float(binary_opening(dark, np.hypot(x, y) <= 9)[where].mean()) + 1e-4


def test_necrosis_is_pinker_than_lymphatic_tissue(
    planted: dict[AnomalyKind, tuple[np.ndarray, Anomaly]], normal_slide: Path
) -> None:
    """Eosin takes green and leaves red."""
    pixels, anomaly = planted["necrosis"]
    within = inside(anomaly, pixels)
    red_over_green = (pixels[..., 0] - pixels[..., 1])[within].mean()
    normal = pixels_of(normal_slide)
    assert red_over_green > 1.5 * (normal[..., 0] - normal[..., 1])[within].mean()


@pytest.mark.parametrize("seed", range(6))
def test_anomalies_lie_apart_within_the_slide(seed: int, tmp_path: Path) -> None:
    """Two outlines are valid, keep off each other and off the edge of the slide."""
    first, second = write_slide(
        tmp_path / "s.tif", seed=seed, size_px=(1024, 768), anomalies=("metastasis", "necrosis")
    )
    slide = shapely.box(0, 0, 1024, 768)
    assert first.outline_level0_px.is_valid
    assert second.outline_level0_px.is_valid
    assert slide.contains(first.outline_level0_px)
    assert slide.contains(second.outline_level0_px)
    assert not first.outline_level0_px.intersects(second.outline_level0_px)


def test_annotations_are_what_qupath_expects(tmp_path: Path) -> None:
    """Annotations with a class, a colour and a valid polygon in level-0 pixels."""
    line = shapely.Polygon([(10, 10), (200.5, 12), (150, 300)])
    write_annotations(tmp_path / "a.geojson", [Anomaly("metastasis", line), Anomaly("necrosis", line)])
    collection = json.loads((tmp_path / "a.geojson").read_text(encoding="utf-8"))
    assert collection["type"] == "FeatureCollection"
    tumour, necrosis = collection["features"]
    assert tumour["properties"]["objectType"] == "annotation"
    assert tumour["properties"]["classification"] == {"name": "Tumor", "color": [200, 0, 0]}
    assert necrosis["properties"]["classification"]["name"] == "Necrosis"
    assert tumour["id"] != necrosis["id"]
    assert shapely.geometry.shape(tumour["geometry"]).equals(line)


def test_a_cohort_has_slides_labels_and_outlines(tmp_path: Path) -> None:
    """Each abnormal test slide has its outlines, a normal one none."""
    cohort = write_cohort(tmp_path, size_px=(512, 512), normal_slides=2, normal_test_slides=1, abnormal_test_slides=3)
    assert sorted((tmp_path / "normal").iterdir()) == list(cohort.normal_slides)
    assert sorted((tmp_path / "test").iterdir()) == list(cohort.test_slides)
    with cohort.labels.open(encoding="utf-8") as file:
        labels = {row["slide_id"]: row["label"] for row in csv.DictReader(file)}
    assert labels == {"test_01": "normal", "test_02": "abnormal", "test_03": "abnormal", "test_04": "abnormal"}
    outlines = {
        path.stem: [
            feature["properties"]["classification"]["name"] for feature in json.loads(path.read_text())["features"]
        ]
        for path in cohort.annotations.iterdir()
    }
    assert outlines == {"test_02": ["Tumor"], "test_03": ["Necrosis"], "test_04": ["Tumor", "Necrosis"]}


def test_slides_of_a_cohort_differ(tmp_path: Path) -> None:
    """No slide is there twice, so nothing is learnt from what is tested."""
    cohort = write_cohort(tmp_path, size_px=(512, 512), normal_slides=2, normal_test_slides=2, abnormal_test_slides=0)
    assert len({path.read_bytes() for path in cohort.normal_slides + cohort.test_slides}) == 4


def test_a_pyramid_keeps_pixels_and_averages_them_down(tmp_path: Path) -> None:
    """Level 0 is the image, the next level the mean of two by two, also where the sides are no multiple of a tile."""
    y, x = np.mgrid[:611, :530]
    image = np.stack([x // 3, y // 3, (x + y) // 5], axis=2).astype(np.uint8)
    write_pyramid(tmp_path / "p.tif", image, mpp=0.25)
    with openslide.OpenSlide(tmp_path / "p.tif") as slide:
        assert slide.level_dimensions == ((530, 611), (265, 305), (132, 152))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
    halves = image[:610].reshape(305, 2, 265, 2, 3).mean(axis=(1, 3))
    assert np.abs(pixels_of(tmp_path / "p.tif") - image).mean() < 1
    assert np.abs(pixels_of(tmp_path / "p.tif", level=1) - halves).mean() < 1.5


def test_a_pyramid_can_be_streamed_from_tiles(tmp_path: Path) -> None:
    """Tiles that come one at a time make the same file as the whole image."""
    image = np.random.default_rng(0).integers(0, 255, (512, 768, 3), np.uint8)
    tiles = (image[row : row + 256, column : column + 256] for row in (0, 256) for column in (0, 256, 512))
    write_pyramid_from_tiles(tmp_path / "tiles.tif", tiles, size_px=(768, 512), mpp=0.5)
    write_pyramid(tmp_path / "whole.tif", image, mpp=0.5)
    assert (tmp_path / "tiles.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


@pytest.mark.parametrize("count", [5, 7])
def test_a_wrong_number_of_tiles_is_refused(count: int, tmp_path: Path) -> None:
    """A slide with a hole, or with tiles left over, is never written in silence."""
    tiles = (np.zeros((256, 256, 3), np.uint8) for _ in range(count))
    with pytest.raises(ValueError, match="tile"):
        write_pyramid_from_tiles(tmp_path / "p.tif", tiles, size_px=(768, 512), mpp=0.5)
