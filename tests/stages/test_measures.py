from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, roc_auc_score, roc_curve

from wsi_anomaly.annotations import SlideLabel
from wsi_anomaly.errors import OptionsError
from wsi_anomaly.imaging.geometry import Grid
from wsi_anomaly.imaging.heatmap import erode
from wsi_anomaly.imaging.segmentation import overlap_curve
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.protocol import PROTOCOLS, Protocol, choose_protocol
from wsi_anomaly.stages.evaluate.sanity import sanity_warnings
from wsi_anomaly.stages.evaluate.slide_by_slide import (
    common_threshold,
    segment,
    segmentation_intervals,
    segmentation_measures,
    slide_rows,
)
from wsi_anomaly.stages.evaluate.slide_level import compare, rank_slides, scores_of, slide_intervals, slide_measures
from wsi_anomaly.stages.evaluate.tile_level import certain_tiles, rank_tiles, tile_intervals, tile_measures
from wsi_anomaly.storage.layout import SlideFolder

FAST = Protocol(resamples=100)
NORMAL, ABNORMAL = SlideLabel(abnormal=False), SlideLabel(abnormal=True)
MACRO = SlideLabel(abnormal=True, subgroup="macro")


def slide(name: str, z: Any, share: Any = 0.0, label: SlideLabel = NORMAL) -> Evidence:
    """A slide of (row, column) z and shares; one share stands for every tile, None for no annotation."""
    z = np.array(z, np.float64)
    rows, columns = z.shape
    grid = Grid.over((0, 0, columns * 8, rows * 8), downsample=(1.0, 1.0), tile_px=8, stride_px=8)
    return Evidence(
        name,
        label,
        None if share is None else np.broadcast_to(np.array(share, np.float64), z.shape).ravel(),
        z_tile=z.ravel(),
        ranks=None,
        cells=grid.cells(),
        tile_grid=grid,
        cell_um=4.0,
        folder=SlideFolder(Path("nowhere") / name),
        annotation=None,
    )


def cohort(count: int = 12, seed: int = 0, effect: float = 1.0, labels: tuple[SlideLabel, ...] = ()) -> list[Evidence]:
    """Half of the slides are normal; the others have a block of 4 x 6 tiles whose z is `effect` higher."""
    random = np.random.default_rng(seed)
    slides = []
    for number in range(count):
        z, share = random.normal(0, 1, (10, 12)), np.zeros((10, 12))
        label = NORMAL
        if number >= count // 2:
            label = labels[number % len(labels)] if labels else ABNORMAL
            share[3:7, 2:8] = 1.0
            share[7, 2:8] = 0.4
            z += effect * share
        slides.append(slide(f"slide_{number:02}", z, share, label))
    return slides


def tile_level(evidence: list[Evidence], protocol: Protocol = FAST) -> dict[str, Any]:
    """The measures of tiles."""
    return tile_measures(evidence, rank_tiles([certain_tiles(one, protocol) for one in evidence]))


def warnings_of(evidence: list[Evidence], protocol: Protocol = FAST) -> list[str]:
    """What is said of them."""
    tiles = [certain_tiles(one, protocol) for one in evidence]
    return list(sanity_warnings(evidence, tiles, rank_tiles(tiles), protocol))


def test_tile_measures_are_those_of_scikit_learn() -> None:
    """Of the tiles that are certain: share 0 and share 1."""
    evidence = cohort()
    z = np.concatenate([one.z_tile for one in evidence]).astype(np.float32)
    share = np.concatenate([one.share for one in evidence if one.share is not None])
    z, truth = z[share != 0.4], share[share != 0.4] == 1
    fpr, tpr, _ = roc_curve(truth, z, drop_intermediate=False)
    assert tile_level(evidence) == {
        "tiles": truth.size,
        "abnormal_tiles": truth.sum(),
        "tiles_without_score": 0,
        "tile_auroc": pytest.approx(roc_auc_score(truth, z)),
        "tile_aupr": pytest.approx(average_precision_score(truth, z)),
        "tile_aupr_out": pytest.approx(average_precision_score(truth, z)),
        "tile_aupr_in": pytest.approx(average_precision_score(~truth, -z)),
        "tile_fpr_at_95_tpr": pytest.approx(fpr[tpr >= 0.95].min()),
        "tile_detection_error": pytest.approx(((1 - tpr + fpr) / 2).min()),
    }


def test_tile_measures_of_four_tiles_are_those_made_by_hand() -> None:
    """Abnormal 3 and 1, normal 2 and 0; a tile without a score is counted and left out."""
    found = tile_level([slide("a", [[3.0, 1, 2, 0, np.nan]], [[1, 1, 0, 0, 1]], ABNORMAL)])
    assert found == {
        "tiles": 4,
        "abnormal_tiles": 2,
        "tiles_without_score": 1,
        "tile_auroc": 0.75,
        "tile_aupr": pytest.approx((1 + 2 / 3) / 2),
        "tile_aupr_out": pytest.approx((1 + 2 / 3) / 2),
        "tile_aupr_in": pytest.approx((1 + 2 / 3) / 2),
        "tile_fpr_at_95_tpr": 0.5,
        "tile_detection_error": 0.25,
    }


def test_the_user_says_from_what_share_a_tile_is_abnormal_and_up_to_which_it_is_normal() -> None:
    """The tiles in between are left out."""
    evidence = cohort(2)
    assert tile_level(evidence)["abnormal_tiles"] == 24
    assert tile_level(evidence)["tiles"] == 240 - 6
    half = choose_protocol(abnormal_from=0.3)
    assert (tile_level(evidence, half)["abnormal_tiles"], tile_level(evidence, half)["tiles"]) == (30, 240)
    lenient = choose_protocol(normal_up_to=0.4)
    assert (tile_level(evidence, lenient)["abnormal_tiles"], tile_level(evidence, lenient)["tiles"]) == (24, 240)


def test_the_normal_tissue_of_abnormal_slides_counts_unless_the_user_says_no() -> None:
    """Only the two slides' tiles that touch no outline make the difference."""
    evidence = cohort(2)
    alone = tile_level(evidence, choose_protocol(negatives="normal-slides"))
    of_normal_slides = sum(len(one.cells) for one in evidence if not one.label.abnormal)
    assert alone["tiles"] == of_normal_slides + alone["abnormal_tiles"]
    assert tile_level(evidence, choose_protocol("released", negatives="all")) == tile_level(evidence)


def test_own_choices_change_a_protocol_and_are_named() -> None:
    """The rest stays as the protocol has it."""
    own = choose_protocol("released", abnormal_from=0.5, threshold_z=1.5)
    assert own == PROTOCOLS["released"].model_copy(update={"abnormal_from": 0.5, "threshold_z": 1.5})
    assert choose_protocol() == Protocol()
    said = " ".join(own.choices())
    assert "to 0.5 or more inside" in said
    assert "eroded z above 1.5" in said


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"abnormal_from": 0.3, "normal_up_to": 0.5},
            r"'abnormal_from' = 0\.3: must be larger than 'normal_up_to' = 0\.5",
        ),
        ({"abnormal_from": 0.5, "normal_up_to": 0.5}, "must be larger"),
        ({"abnormal_from": 1.5}, r"'abnormal_from' = 1\.5: .*less than or equal to 1"),
        ({"normal_up_to": -0.1}, r"'normal_up_to' = -0\.1: .*greater than or equal to 0"),
        ({"threshold_z": float("nan")}, "'threshold_z'"),
    ],
)
def test_choices_that_make_no_sense_are_refused_by_name(own: dict[str, float], message: str) -> None:
    """Also those that contradict each other."""
    with pytest.raises(OptionsError, match=message):
        choose_protocol(**own)


def test_tile_intervals_are_those_of_a_plain_loop_over_slides() -> None:
    """Slides are drawn, abnormal and normal ones apart, and each brings all of its tiles."""
    evidence = cohort(40)
    tiles = [certain_tiles(one, FAST) for one in evidence]
    found = tile_intervals(tiles, rank_tiles(tiles), Protocol(resamples=500))
    random, drawn = np.random.default_rng(1), []
    for _ in range(300):
        chosen = [tiles[number] for start in (0, 20) for number in start + random.integers(0, 20, 20)]
        truth, z = (np.concatenate([getattr(one, name) for one in chosen]) for name in ("abnormal", "z"))
        drawn.append([roc_auc_score(truth, z), average_precision_score(truth, z)])
    assert set(found) == {name for name in tile_level(evidence) if name.startswith("tile_")}
    for name, column in zip(("tile_auroc", "tile_aupr"), np.array(drawn).T, strict=True):
        assert found[name] == pytest.approx(tuple(np.quantile(column, [0.025, 0.975])), abs=0.015)


def test_tiles_that_are_alike_within_a_slide_leave_a_wider_interval() -> None:
    """Drawing tiles as if they were independent would hide that."""
    widths = []
    for spread in (0.0, 1.0):
        offsets = np.random.default_rng(0).normal(0, spread, 12)
        evidence = [
            slide(one.slide_id, (one.z_tile + offset).reshape(10, 12), np.reshape(one.share, (10, 12)), one.label)
            for one, offset in zip(cohort(), offsets, strict=True)
        ]
        tiles = [certain_tiles(one, FAST) for one in evidence]
        low, high = tile_intervals(tiles, rank_tiles(tiles), FAST)["tile_auroc"]
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_slide_measures_are_those_of_scikit_learn_for_all_and_for_a_subgroup() -> None:
    """A subgroup stands against all normal slides."""
    evidence = cohort(24, effect=0.5, labels=(MACRO, ABNORMAL))
    scores = scores_of(evidence, FAST)
    found = slide_measures(evidence, scores)
    assert (found["slides"], found["abnormal_slides"], found["slides_without_score"]) == (24, 12, 0)
    z_max = np.array([erode(one.z)[np.isfinite(one.z)].max() for one in evidence])
    truth = np.array([one.label.abnormal for one in evidence])
    counts = np.array([one.label in (NORMAL, MACRO) for one in evidence])
    assert found["slide_auroc_z_max"] == pytest.approx(roc_auc_score(truth, z_max))
    assert found["slide_aupr_z_max"] == pytest.approx(average_precision_score(truth, z_max))
    assert found["slide_auroc_z_max_macro"] == pytest.approx(roc_auc_score(truth[counts], z_max[counts]))
    fpr, tpr, _ = roc_curve(truth, z_max, drop_intermediate=False)
    assert found["slide_sensitivity_at_90_specificity_z_max"] == tpr[fpr <= 0.1 + 1e-9].max()
    assert rank_slides(evidence, scores)["z_99_macro"].abnormal == 6


def test_every_slide_measure_has_an_interval_around_it() -> None:
    """AUROC has two."""
    evidence = cohort(24, effect=0.5, labels=(MACRO, ABNORMAL))
    scores = scores_of(evidence, FAST)
    measures, found = slide_measures(evidence, scores), slide_intervals(evidence, scores, FAST)
    names = {name for name in measures if name.startswith("slide_")}
    assert set(found) == names | {name.replace("auroc", "auroc_bootstrap") for name in names}
    assert all(found[name][0] <= (measures[name] or 0) <= found[name][1] for name in names)


def test_detectors_are_compared_by_measure_and_subgroup() -> None:
    """DeLong's test for AUROC, a paired bootstrap for the rest."""
    first, second = (cohort(24, effect=effect, labels=(MACRO, ABNORMAL)) for effect in (4.0, -4.0))
    found = compare(first, second, FAST)
    measures = [
        "auroc",
        "aupr",
        "sensitivity_at_90_specificity",
        "sensitivity_at_95_specificity",
    ]
    groups = ["z_max", "z_99", "z_max_macro", "z_99_macro"]
    assert set(found) == {f"slide_{measure}_{group}" for measure in measures for group in groups}
    one, other = (slide_measures(slides, scores_of(slides, FAST)) for slides in (first, second))
    for name, test in found.items():
        assert test.difference == pytest.approx((one[name] or 0) - (other[name] or 0))
        assert test.method == ("DeLong" if "auroc" in name else "paired bootstrap")
        assert test.p_value < 0.05


def test_a_test_without_variance_knows_how_few_slides_there_are() -> None:
    """All right against all wrong on four slides is no proof, whatever DeLong says."""
    right = [slide(f"s{n}", [[float(n)]], label=ABNORMAL if n > 1 else NORMAL) for n in range(4)]
    wrong = [slide(f"s{n}", [[-float(n)]], label=ABNORMAL if n > 1 else NORMAL) for n in range(4)]
    found = compare(right, wrong, FAST)["slide_auroc_z_max"]
    assert (found.difference, found.p_value, found.method) == (1.0, 2 / 2**4, "paired bootstrap")


def test_a_slide_without_any_score_is_left_out_of_measures_and_tests_and_is_named() -> None:
    """For either detector."""
    evidence = cohort(12)
    blank = slide("slide_00", np.full((10, 12), np.nan))
    found = slide_measures([blank, *evidence[1:]], scores_of([blank, *evidence[1:]], FAST))
    assert found["slides_without_score"] == 1
    assert (
        found["slide_auroc_z_max"] == slide_measures(evidence[1:], scores_of(evidence[1:], FAST))["slide_auroc_z_max"]
    )
    other = cohort(12, seed=5, effect=0.0)
    assert compare(evidence, [blank, *other[1:]], FAST) == compare(evidence[1:], other[1:], FAST)
    assert "no tile has a score, so left out: slide_00" in warnings_of([blank, *evidence[1:]])
    values = segment(blank, FAST).values
    assert set(values.values()) == {None}


def test_segmentation_of_a_slide_is_the_one_made_by_hand() -> None:
    """Erosion takes the least of the cell, above, left and above left."""
    one = slide("a", [[-1.0, -1, -1, -1], [-1, 2, 1, -1], [-1, 3, 2, -1]], [[0] * 4, [0, 1, 1, 0], [0, 1, 1, 0]], MACRO)
    found = segment(one, FAST)
    assert found.values["dice_before_erosion"] == 1.0
    assert found.values["dice"] == pytest.approx(2 / 5)  # one of four cells is left
    assert found.values["iou"] == pytest.approx(1 / 4)
    assert (found.values["components"], found.values["components_found"]) == (1, 1)
    assert found.values["tnr"] is None
    row = slide_rows([found], scores_of([one], FAST))[0]
    assert (row["slide_id"], row["label"], row["subgroup"], row["annotated_tiles"]) == ("a", "abnormal", "macro", 4)
    assert (row["z_max"], row["z_99"]) == (1.0, 1.0)


def test_means_over_slides_are_those_of_scikit_learn() -> None:
    """Dice is F1 and IoU is Jaccard's index; each slide counts the same."""
    evidence = cohort(labels=(MACRO, ABNORMAL))
    protocol = Protocol(threshold_z=0.3)
    segmented = [segment(one, protocol) for one in evidence]
    found = segmentation_measures(segmented)
    pairs = [((one.z_eroded > 0.3).ravel(), one.truth.ravel()) for one in evidence]
    dice, iou = ([measured(truth, over) for over, truth in pairs[6:]] for measured in (f1_score, jaccard_score))
    assert found["dice_abnormal_slides"] == pytest.approx(np.mean(dice))
    assert found["iou_abnormal_slides"] == pytest.approx(np.mean(iou))
    macro = [one.label == MACRO for one in evidence[6:]]
    assert found["dice_abnormal_slides_macro"] == pytest.approx(np.mean(np.array(dice)[macro]))
    assert found["tnr_normal_slides"] == pytest.approx(np.mean([1 - over.mean() for over, _ in pairs[:6]]))
    intervals = segmentation_intervals(segmented, FAST)
    for name in ("dice_abnormal_slides", "iou_abnormal_slides", "tnr_normal_slides"):
        assert intervals[name][0] < (found[name] or 0) < intervals[name][1]


def test_the_best_thresholds_are_those_that_a_search_over_all_of_them_finds() -> None:
    """One for each slide, and one for all slides together."""
    evidence = cohort(4)
    segmented = [segment(one, FAST) for one in evidence]
    found = segmentation_measures(segmented)
    every = np.unique(np.concatenate([one.z_eroded.ravel() for one in evidence[2:]]))

    def dice_at(one: Evidence, threshold: float) -> float:
        return float(f1_score(one.truth.ravel(), one.z_eroded.ravel() > np.float32(threshold)))

    table = np.array([[dice_at(one, threshold) for threshold in every] for one in evidence[2:]])
    assert found["dice_common_threshold"] == pytest.approx(table.mean(0).max())
    assert found["common_threshold_z"] == pytest.approx(every[table.mean(0).argmax()])
    assert found["dice_best_threshold"] == pytest.approx(table.max(1).mean())
    assert [one.values["best_threshold_z"] for one in segmented[2:]] == pytest.approx(every[table.argmax(1)].tolist())
    assert found["tnr_common_threshold"] == pytest.approx(
        np.mean([(one.z_eroded <= np.float32(found["common_threshold_z"] or 0)).mean() for one in evidence[:2]])
    )
    assert (found["dice_common_threshold"] or 0) <= (found["dice_best_threshold"] or 0)


def test_the_common_threshold_of_one_slide_is_its_best() -> None:
    """And of none there is none."""
    one = cohort(2)[1]
    curve = overlap_curve(one.z_eroded, one.truth)
    assert common_threshold([curve]) == curve.best.threshold_z
    assert common_threshold([]) is None


def test_areas_are_the_means_over_the_share_of_tiles_found() -> None:
    """Three tiles, the highest two abnormal: by trapezoids through (0, 0), (1/3, .), (2/3, 1), (1, .)."""
    found = segment(slide("a", [[1.0], [2.0], [3.0]], [[0.0], [1.0], [1.0]], ABNORMAL), FAST).values
    # Erosion leaves 1, 1, 2: of the shares 0, 1/3 and 1 of the tiles, one, then all three are found.
    shares, dice, iou = [0, 1 / 3, 1], [0, 2 / 3, 4 / 5], [0, 1 / 2, 2 / 3]
    for name, values in (("dice_area", dice), ("iou_area", iou)):
        steps = [
            (x1 - x0) * (y0 + y1) / 2 for (x0, x1), (y0, y1) in zip(pairwise(shares), pairwise(values), strict=True)
        ]
        assert found[name] == pytest.approx(sum(steps))


def test_rows_of_slides_of_every_kind_have_equal_names() -> None:
    """Normal, abnormal, without annotation, without score."""
    evidence = [*cohort(2), slide("undrawn", [[1.0, 2]], None, ABNORMAL), slide("blank", [[np.nan]])]
    rows = slide_rows([segment(one, FAST) for one in evidence], scores_of(evidence, FAST))
    assert len({tuple(row) for row in rows}) == 1
    undrawn, blank = rows[2:]
    assert (undrawn["z_max"], undrawn["dice"], undrawn["tnr"], undrawn["annotated_tiles"]) == (1.0, None, None, None)
    assert (blank["tiles"], blank["tiles_without_score"], blank["z_max"]) == (1, 1, None)


def test_an_abnormal_slide_without_annotation_counts_for_slides_alone() -> None:
    """It is named, and it is no normal slide either."""
    evidence = [*cohort(4), slide("undrawn", np.ones((10, 12)), None, ABNORMAL)]
    assert tile_level(evidence)["tiles"] == tile_level(evidence[:-1])["tiles"]
    assert segmentation_measures([segment(one, FAST) for one in evidence]) == segmentation_measures(
        [segment(one, FAST) for one in evidence[:-1]]
    )
    assert "abnormal without annotation, so at the slide level only: undrawn" in warnings_of(evidence)


@pytest.mark.parametrize(("chosen", "missing"), [(slice(None, 6), "abnormal"), (slice(6, None), "normal")])
def test_a_missing_class_is_named_and_the_rest_is_given(chosen: slice, missing: str) -> None:
    """No number is made up."""
    evidence = cohort()[chosen]
    protocol = Protocol(negatives="normal-slides")
    slides = slide_measures(evidence, scores_of(evidence, protocol))
    assert slides["slide_auroc_z_max"] is slides["slide_aupr_z_99"] is None
    assert tile_level(evidence, protocol)["tile_auroc"] is None
    assert slide_intervals(evidence, scores_of(evidence, protocol), FAST) == {}
    tiles = [certain_tiles(one, protocol) for one in evidence]
    assert tile_intervals(tiles, rank_tiles(tiles), FAST) == {}
    said = warnings_of(evidence, protocol)
    assert any(line.startswith(f"no slide is {missing}") for line in said)
    assert any(line.startswith(f"no tile is surely {missing}") for line in said)
    found = segmentation_measures([segment(one, protocol) for one in evidence])
    given, absent = ("tnr_normal_slides", "dice_abnormal_slides")[:: 1 if missing == "abnormal" else -1]
    assert found[given] is not None
    assert found[absent] is None


@pytest.mark.parametrize(
    ("z", "said"),
    [
        (lambda z: z + 3, "100% of the normal tiles lie above z = 0"),
        (lambda z: z + 3, "median z of 3.0: it differs from the reference"),
        (lambda z: 4 * z, "spread 4 times as widely as in the reference"),
        (lambda z: z / 10, "spread 0.1 times as widely as in the reference"),
        (lambda z: 0 * z, "all tiles have the same score"),
        (lambda z: np.where(z > 0.5, np.nan, z), "of the tiles have no score"),
    ],
)
def test_a_detector_that_cannot_be_trusted_is_marked(z: Any, said: str) -> None:
    """Normal tissue is held against the reference by its place and by its spread."""
    evidence = [slide("a", z(np.random.default_rng(0).normal(size=(40, 50))))]
    assert any(said in line for line in warnings_of(evidence))


def test_a_good_detector_is_not_marked() -> None:
    """On a cohort of both classes."""
    assert warnings_of(cohort()) == []


def test_a_label_that_an_annotation_contradicts_is_named() -> None:
    """The slide is listed."""
    evidence = [*cohort(4), slide("odd", np.zeros((1, 4)), [[0, 0, 1, 1]])]
    assert "labelled normal, but something abnormal is annotated: odd" in warnings_of(evidence)
