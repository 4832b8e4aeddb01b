import csv
import json
from pathlib import Path
from typing import get_args

import numpy as np
import openslide
import pytest
import shapely
from PIL import Image
from scipy.ndimage import binary_closing, binary_opening

from wsi_anomaly.prompts.keywords import load_keywords
from wsi_anomaly.synthetic import (
    Anomaly,
    AnomalyKind,
    ArtefactKind,
    TileKind,
    VirtualSlide,
    captions,
    draw_region,
    draw_slide,
    keywords_of,
    synthetic_tiles,
    tile_with_truth,
    truth_of,
    write_annotations,
    write_cohort,
    write_pyramid,
    write_pyramid_from_tiles,
    write_slide,
)
from wsi_anomaly.synthetic.sprites import Cell, sprites_of
from wsi_anomaly.synthetic.structures import Structure
from wsi_anomaly.synthetic.vocabulary import vocabulary

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


@pytest.fixture(scope="module")
def sick_slide() -> VirtualSlide:
    """A small slide with three kinds of disease and no artefact."""
    return draw_slide(7, size_px=(2048, 2048), anomalies=("metastasis", "mucin", "isolated_tumour_cells"))


@pytest.mark.parametrize("artefacts", [(), ("fold", "pen", "bubble", "out_of_focus")])
def test_a_region_does_not_depend_on_what_else_is_drawn(artefacts: tuple[ArtefactKind, ...]) -> None:
    """Four neighbours, and one across them that starts between the pixels of the map, are parts of the whole."""
    slide = draw_slide(3, size_px=(1024, 1024), anomalies=("metastasis",), artefacts=artefacts, varied=True)
    whole = draw_region(slide, (251, 262), (512, 512)).astype(int)
    for x, y in ((0, 0), (256, 0), (0, 256), (256, 256), (131, 117)):
        part = draw_region(slide, (251 + x, 262 + y), (256, 256))
        assert np.abs(part - whole[y : y + 256, x : x + 256]).max() <= 1


def test_a_region_may_reach_beyond_the_slide() -> None:
    """There is glass."""
    slide = draw_slide(3, size_px=(512, 512))
    assert draw_region(slide, (-300, -300), (200, 200)).min() > 220


def test_the_truth_of_a_tile_is_that_of_the_map(sick_slide: VirtualSlide) -> None:
    """Shares sum to one, the largest first, and the middle of a metastasis is one."""
    (metastasis, *_) = sick_slide.anomalies
    x, y = (int(value) for value in metastasis.outline_level0_px.centroid.coords[0])
    pixels, truth = tile_with_truth(sick_slide, (x - 64, y - 64), tile_px=128)
    assert pixels.shape == (128, 128, 3)
    assert sum(truth.shares.values()) == pytest.approx(1)
    assert list(truth.shares.values()) == sorted(truth.shares.values(), reverse=True)
    assert truth.anomalies == ("metastasis",)
    assert not truth.is_normal
    tumour = {"tumour_nest", "tumour_gland", "gland_lumen", "tumour_stroma", "cleft"}
    assert sum(truth.shares.get(name, 0) for name in tumour) == pytest.approx(1)


def test_a_truth_is_normal_away_from_what_was_planted(sick_slide: VirtualSlide) -> None:
    """The corner of the slide is glass and nothing else."""
    truth = truth_of(sick_slide, (0, 0), (64, 64))
    assert truth.is_normal
    assert truth.shares == {"glass": 1.0}


@pytest.mark.parametrize("kind", get_args(ArtefactKind))
def test_an_artefact_is_no_disease(kind: ArtefactKind, tmp_path: Path) -> None:
    """It has a list and a class of its own, and changes no pixel far from it."""
    clean = draw_slide(5, size_px=(768, 768))
    slide = draw_slide(5, size_px=(768, 768), artefacts=(kind,))
    (artefact,) = slide.artefacts
    assert not slide.anomalies
    left, top, right, bottom = (int(value) for value in artefact.outline_level0_px.bounds)
    truth = truth_of(slide, (left, top), (right - left, bottom - top))
    assert (truth.anomalies, truth.artefacts, truth.is_normal) == ((), (kind,), False)
    whole = ((0, 0), (768, 768))
    changed = np.abs(draw_region(slide, *whole).astype(int) - draw_region(clean, *whole)).max(axis=2) > 20
    around = Anomaly("fibrosis", artefact.outline_level0_px.buffer(40))
    assert changed[inside(Anomaly("fibrosis", artefact.outline_level0_px), changed)].mean() > 0.15
    assert not changed[~inside(around, changed)].any()
    write_annotations(tmp_path / "a.geojson", slide.artefacts)
    (feature,) = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert feature["properties"]["classification"]["name"].startswith("Artefact")


def test_every_keyword_of_a_structure_is_in_the_list() -> None:
    """On its own side: what disease shows is no keyword of normal tissue."""
    keywords = load_keywords("lymph_node")
    normal = {keyword.text for keyword in keywords.normal}
    abnormal = {keyword.text for keyword in keywords.abnormal}
    for structure in Structure:
        spoken = set(vocabulary()[structure.name.lower()].keywords)
        assert spoken <= (abnormal if structure.is_abnormal else normal), structure


def test_no_structure_is_without_words() -> None:
    """Also those for which the list has no keyword."""
    assert set(vocabulary()) == {structure.name.lower() for structure in Structure}
    assert all(entry.words for entry in vocabulary().values())


def test_only_what_takes_room_in_a_tile_is_spoken_of() -> None:
    """The largest structure first; one that is hardly there not at all."""
    keywords = keywords_of({"germinal_centre": 0.7, "mantle_zone": 0.29, "metastasis": 0.0, "necrosis": 0.01})
    assert keywords[0] == "germinal center"
    assert "mantle zone" in keywords
    assert "Caseous necrosis" not in keywords
    assert keywords_of({"glass": 1.0}) == ()


def test_captions_are_true_and_differ() -> None:
    """Each phrase is a keyword of a structure that is there, or its plain words."""
    shares = {"paracortex": 0.6, "high_endothelial_venule": 0.3, "trabecula": 0.1}
    true = set(keywords_of(shares)) | {vocabulary()[name].words for name in shares}
    rng = np.random.default_rng(0)
    texts = [captions(shares, rng) for _ in range(40)]
    assert len(set(texts)) > 20
    assert all(part in true for text in texts for part in text.split(", "))


def test_a_stream_gives_what_was_asked_for() -> None:
    """As many tiles, the kinds in turn, each with its own kind in its middle; a normal one has none."""
    kinds: tuple[TileKind, ...] = ("normal", "mucin", "fold")
    tiles = list(synthetic_tiles(4, 7, tile_px=64, kinds=kinds))
    assert [pixels.shape for pixels, _ in tiles] == [(64, 64, 3)] * 7
    found = [truth.anomalies + truth.artefacts for _, truth in tiles]
    assert found == [(), ("mucin",), ("fold",), (), ("mucin",), ("fold",), ()]


def test_a_stream_repeats_itself_and_another_seed_does_not() -> None:
    """What is learnt from it can be learnt again."""
    first, again, other = (
        np.stack([pixels for pixels, _ in synthetic_tiles(seed, 4, tile_px=32)]) for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_stains_differ_between_slides_of_a_stream() -> None:
    """The hue of haematoxylin goes from violet to brown, more than a cohort's own slides differ."""
    varied = [draw_slide(seed, size_px=(256, 256), varied=True).look for seed in range(12)]
    usual = [draw_slide(seed, size_px=(256, 256)).look for seed in range(12)]
    blue = [
        np.std([look.optical_density[0, 2] / look.optical_density[0].sum() for look in group])
        for group in (varied, usual)
    ]
    assert blue[0] > 3 * blue[1]
    assert len({look.jpeg_quality for look in varied}) > 4


@pytest.mark.parametrize(
    ("cell", "smallest_um", "largest_um"),
    [
        (Cell.LYMPHOCYTE, 5, 8),
        (Cell.CENTROBLAST, 6.5, 12),
        (Cell.PALE_TUMOUR_NUCLEUS, 8, 20),
        (Cell.DARK_TUMOUR_NUCLEUS, 8, 20),
    ],
)
def test_nuclei_have_the_size_of_their_kind(cell: Cell, smallest_um: float, largest_um: float) -> None:
    """The diameter of a disc of the same area, of nine in ten."""
    nuclei = sprites_of(cell).ink[..., 0] > 0.17
    diameters_um = 0.5 * np.sqrt(4 / np.pi * nuclei.sum(axis=(1, 2)))
    assert ((diameters_um > smallest_um) & (diameters_um < largest_um)).mean() >= 0.9


def test_normal_tiles_have_the_colours_of_camelyon(shared_data: Path) -> None:
    """At the scale of PatchCamelyon, tissue is as dark in each channel as most of its own tiles."""
    folder = shared_data / "tiles" / "pcam" / "test_normal"
    real = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())[:200]]
    real = [tile for tile in real if (tile.min(axis=2) > 200).mean() < 0.2]
    made = [pixels for seed in range(7) for pixels, _ in synthetic_tiles(seed, 2, tile_px=192)]
    low, high = np.percentile([tile.mean(axis=(0, 1)) for tile in real], [10, 90], axis=0)
    middle = np.median([tile.mean(axis=(0, 1)) for tile in made], axis=0)
    assert (middle > low).all()
    assert (middle < high).all()
