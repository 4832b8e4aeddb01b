import numpy as np
import pytest

from wsi_anomaly.imaging.typicality import FEWEST, Census, Placement, fit_map, grid_shape, place, u_matrix


def clusters(sizes: tuple[int, ...], *, features: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around centres far from each other, in random order, and which centre each belongs to."""
    random = np.random.default_rng(seed)
    kind = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = random.normal(0, 6, (len(sizes), features))
    return (centres[kind] + random.normal(size=(len(kind), features))).astype(np.float32), kind


@pytest.mark.parametrize("sizes", [(300, 300), (500, 40), (200, 200, 200, 200)])
def test_kinds_have_regions_of_their_own(sizes: tuple[int, ...]) -> None:
    """No cell holds two of them, and cells of a kind hang together: their neighbours are of it, or empty."""
    vectors, kind = clusters(sizes)
    typicality = fit_map(vectors)
    cell = place(typicality, vectors).cell
    of_cell = np.full(typicality.shape, -1)
    for number in range(len(sizes)):
        here = np.unravel_index(np.unique(cell[kind == number]), typicality.shape)
        assert (of_cell[here] == -1).all()
        of_cell[here] = number
    beside = np.concatenate(
        [
            np.stack([of_cell[:-1].ravel(), of_cell[1:].ravel()], axis=1),
            np.stack([of_cell[:, :-1].ravel(), of_cell[:, 1:].ravel()], axis=1),
        ]
    )
    both = beside[(beside >= 0).all(axis=1)]
    assert (both[:, 0] == both[:, 1]).mean() > 0.85


def test_a_ridge_of_the_u_matrix_parts_two_kinds() -> None:
    """Cells that both kinds leave empty lie higher than those in the midst of either."""
    vectors, _ = clusters((300, 300))
    typicality = fit_map(vectors)
    hits = np.bincount(place(typicality, vectors).cell, minlength=typicality.prototypes[..., 0].size)
    borders = u_matrix(typicality).ravel()
    assert borders[hits == 0].mean() > 2 * borders[hits > 2].mean()


def test_the_map_is_the_same_each_time() -> None:
    """To the last bit; the number of tiles is that of more than one portion."""
    vectors = np.random.default_rng(1).normal(size=(5000, 3)).astype(np.float32)
    first, second = (fit_map(vectors, rows=4, columns=6) for _ in range(2))
    assert first.prototypes.tobytes() == second.prototypes.tobytes()


def test_the_map_hardly_depends_on_the_order_of_vectors() -> None:
    """Sums round otherwise, that is all."""
    vectors, _ = clusters((120, 80))
    first, second = fit_map(vectors), fit_map(vectors[::-1].copy())
    np.testing.assert_allclose(first.prototypes, second.prototypes, atol=1e-3)


def test_training_brings_prototypes_nearer_than_the_plane_they_begin_on() -> None:
    """On a bent sheet, which no plane meets."""
    x, y = np.random.default_rng(0).uniform(-1, 1, (2, 2000))
    vectors = np.stack([x, y, 3 * x**2], axis=1).astype(np.float32)
    typicality = fit_map(vectors, rows=10, columns=12)
    error = float(place(typicality, vectors).distance.mean())
    centred = typicality.standardised(vectors)
    off_plane = np.sqrt(np.linalg.eigvalsh(np.cov(centred.T))[0])
    assert error < 0.7 * off_plane


def test_the_unit_of_a_feature_does_not_matter() -> None:
    """Each is standardised; one that never changes tells nothing."""
    vectors, _ = clusters((100, 100), features=3)
    scaled = vectors * np.array([1000, 1, 0.01], np.float32) + np.array([0, 50, 0], np.float32)
    constant = np.full((200, 1), 7, np.float32)
    cells = [place(fit_map(v), v).cell for v in (vectors, scaled, np.hstack([vectors, constant]))]
    assert (cells[0] == cells[1]).mean() > 0.98
    assert (cells[0] == cells[2]).all()


def test_what_never_changed_tells_nothing_of_new_vectors() -> None:
    """Also where it is far from what it was."""
    vectors, _ = clusters((60, 60), features=3)
    typicality = fit_map(np.hstack([vectors, np.zeros((120, 1), np.float32)]))
    new = [np.hstack([vectors, np.full((120, 1), value, np.float32)]) for value in (0, 99)]
    assert (place(typicality, new[0]).cell == place(typicality, new[1]).cell).all()


@pytest.mark.parametrize(
    ("number", "spreads", "sides", "shape"),
    [
        (10_000, (1.0, 1.0), {}, (22, 23)),
        (10_000, (2.0, 1.0), {}, (16, 31)),
        (10_000, (1.0, 0.0), {}, (13, 38)),
        (50, (1.0, 1.0), {}, (6, 6)),
        (10_000, (1.0, 1.0), {"rows": 5}, (5, 100)),
        (10_000, (1.0, 1.0), {"columns": 50}, (10, 50)),
        (10_000, (1.0, 1.0), {"rows": 3, "columns": 4}, (3, 4)),
        (50, (1.0, 1.0), {"rows": 60}, (60, 2)),
    ],
)
def test_the_grid_has_five_times_the_root_of_the_number(
    number: int, spreads: tuple[float, float], sides: dict[str, int], shape: tuple[int, int]
) -> None:
    """Its sides are as the deviations along the first two components, at most as 3 to 1; a given side stays."""
    assert grid_shape(number, spreads, **sides) == shape


def test_the_u_matrix_is_the_mean_distance_to_the_neighbours() -> None:
    """By hand, on a map of two by two."""
    vectors = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    typicality = fit_map(vectors, rows=2, columns=2)
    a, b, c, d = typicality.prototypes.reshape(4, 2)
    expected = [
        (np.linalg.norm(a - b) + np.linalg.norm(a - c)) / 2,
        (np.linalg.norm(b - a) + np.linalg.norm(b - d)) / 2,
        (np.linalg.norm(c - a) + np.linalg.norm(c - d)) / 2,
        (np.linalg.norm(d - b) + np.linalg.norm(d - c)) / 2,
    ]
    assert u_matrix(typicality).ravel() == pytest.approx(expected, rel=1e-5)


def test_a_tile_lies_in_the_cell_of_the_nearest_prototype() -> None:
    """Held against all of them one by one."""
    vectors, _ = clusters((80, 40))
    typicality = fit_map(vectors)
    placement = place(typicality, vectors[:7])
    for vector, cell, distance in zip(vectors, placement.cell, placement.distance, strict=False):
        standard = (vector - typicality.mean) / typicality.deviation
        apart = np.linalg.norm(typicality.prototypes - standard, axis=2).ravel()
        assert cell == apart.argmin()
        assert distance == pytest.approx(apart.min(), abs=1e-3)


@pytest.mark.parametrize(
    ("vectors", "fault"),
    [
        (np.random.default_rng(0).normal(size=(FEWEST - 1, 3)), "49 vectors"),
        (np.random.default_rng(0).normal(size=(FEWEST, 1)), "1 features"),
        (np.full((200, 4), 0.3), "0 features"),
    ],
)
def test_too_little_makes_no_map(vectors: np.ndarray, fault: str) -> None:
    """Few vectors, one feature, or all the same."""
    with pytest.raises(ValueError, match=fault):
        fit_map(vectors.astype(np.float32))


def test_a_map_of_two_values_is_finite() -> None:
    """Most prototypes then have no vector near."""
    vectors = np.repeat(np.array([[0, 0, 1], [1, 5, 1]], np.float32), 100, axis=0)
    typicality = fit_map(vectors)
    assert np.isfinite(typicality.prototypes).all()
    assert np.isfinite(u_matrix(typicality)).all()
    assert len(np.unique(place(typicality, vectors).cell)) == 2


def test_a_census_counts_groups_averages_z_and_keeps_the_nearest_tile() -> None:
    """Over two sources; -1 belongs to no group, NaN has no z, and the earlier tile wins a tie."""
    census = Census((1, 3), groups=2)
    census.add(
        Placement(np.array([0, 0, 2]), np.array([3, 1, 5], np.float32)),
        group=np.array([0, 1, 1]),
        z=np.array([1.0, np.nan, np.nan]),
        source=0,
        tile=np.array([10, 11, 12]),
    )
    census.add(
        Placement(np.array([2, 0, 0]), np.array([4, 1, 2], np.float32)),
        group=np.array([0, -1, 0]),
        z=np.array([np.nan, 3.0, 2.0]),
        source=1,
        tile=np.array([20, 21, 22]),
    )
    assert census.hits.tolist() == [[[2, 0, 1]], [[1, 0, 1]]]
    assert census.all_hits.tolist() == [[4, 0, 2]]
    np.testing.assert_array_equal(census.mean_z, [[2.0, np.nan, np.nan]])
    assert census.nearest.tolist() == [[[0, 11], [-1, -1], [1, 20]]]
    assert census.quantisation_error == pytest.approx(16 / 6)
