"""Facts about densities: what they find unlikely, that a row stands for itself, what their file refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.stats import multivariate_normal

from wsi_anomaly.detectors.density import DENSITY, FEWEST_ITEMS, Density, fit_density, load_density, save_density
from wsi_anomaly.errors import CohortError, ModelError

NAMES = ("gmm", "flow", "knn")


def drawn(count: int, *, seed: int, shift: float = 0.0) -> np.ndarray:
    """Correlated vectors of two clusters, in columns of very different scale, the last one constant."""
    random = np.random.default_rng(seed)
    first = random.normal(size=count) + 6 * random.integers(2, size=count)
    noise = random.normal(size=(2, count))
    columns = [first + shift, 1e3 * (first + 0.3 * noise[0]), 1e-3 * noise[1] - 7 + 1e-3 * shift, np.full(count, 0.1)]
    return np.stack(columns, axis=1).astype(np.float32)


@pytest.fixture(scope="module", params=NAMES)
def density(request: pytest.FixtureRequest) -> Density:
    """One of each kind."""
    return fit_density(request.param, drawn(200, seed=0), seed=1)


def test_vectors_off_the_clusters_are_less_likely_than_new_ones_of_them(density: Density) -> None:
    """Beside them, and between the two, where the mean lies."""
    odd = np.concatenate([drawn(50, seed=2, shift=4.0), np.tile(drawn(200, seed=0).mean(axis=0), (2, 1))])
    assert (density.anomaly(odd)[:, None] > density.anomaly(drawn(50, seed=3))).mean() > 0.9


def test_a_row_has_the_same_bits_in_any_batch(density: Density) -> None:
    """Alone, among others, and in another order."""
    vectors = drawn(150, seed=4)
    values, order = density.anomaly(vectors), np.random.default_rng(5).permutation(150)
    assert values.dtype == np.float32
    assert np.array_equal(density.anomaly(vectors[order]), values[order])
    assert np.array_equal(np.concatenate([density.anomaly(vectors[i : i + 1]) for i in range(150)]), values)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_has_no_value_and_harms_no_other(density: Density, value: float) -> None:
    """It is told as NaN; the others have the bits that they have without it."""
    vectors = drawn(70, seed=4)
    expected = density.anomaly(vectors)
    expected[[3, 66]] = np.nan
    vectors[3, 1] = vectors[66, 0] = value
    assert np.array_equal(density.anomaly(vectors), expected, equal_nan=True)


@pytest.mark.parametrize("name", ["gmm", "knn"])
def test_vectors_that_are_not_finite_are_not_fitted(name: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The density is that of the others, as long as there are enough; the log counts them."""
    vectors, others = drawn(60, seed=0), drawn(9, seed=3)
    spoilt = np.insert(vectors, [0, 30], np.nan, axis=0)
    spoilt[0, 1:] = 1.0
    found = fit_density(name, spoilt, seed=1)
    assert np.array_equal(found.anomaly(others), fit_density(name, vectors, seed=1).anomaly(others))
    assert "2 of 62 vectors are no finite numbers" in caplog.text
    spoilt[FEWEST_ITEMS[name] :, 2] = np.inf
    with pytest.raises(CohortError, match=f"from: {FEWEST_ITEMS[name] - 1}, needed: at least {FEWEST_ITEMS[name]}"):
        fit_density(name, spoilt, seed=1)


def test_no_vectors_have_no_values(density: Density) -> None:
    """An empty batch is no special case."""
    assert density.anomaly(drawn(0, seed=0)).shape == (0,)


def test_what_is_saved_and_loaded_says_the_same(density: Density, tmp_path: Path) -> None:
    """To the bit, and equal fits leave equal files."""
    vectors = np.concatenate([drawn(20, seed=6), 1e6 * drawn(20, seed=7)])
    save_density(density, tmp_path / "one")
    assert np.array_equal(load_density(tmp_path / "one").anomaly(vectors), density.anomaly(vectors))
    assert np.isfinite(density.anomaly(vectors)).all()
    save_density(fit_density(density.name, drawn(200, seed=0), seed=1), tmp_path / "two")
    assert (tmp_path / "one" / DENSITY).read_bytes() == (tmp_path / "two" / DENSITY).read_bytes()


def test_a_mixture_of_one_is_the_normal_distribution_of_scipy() -> None:
    """Mean and covariance of the standardised vectors, and one of the ridges on its diagonal."""
    vectors = np.random.default_rng(0).multivariate_normal([1, -2], [[4, 1.5], [1.5, 1]], 60).astype(np.float32)
    found = fit_density("gmm", vectors, seed=0)
    assert len(found.arrays["weights"]) == 1
    standard = (vectors.astype(float) - vectors.mean(axis=0)) / vectors.std(axis=0)
    covariance, ridges = np.cov(standard.T, bias=True), (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    wanted = [-multivariate_normal(np.zeros(2), covariance + r * np.eye(2)).logpdf(standard) for r in ridges]
    assert min(np.abs(found.anomaly(vectors) - one).max() for one in wanted) < 1e-4


def test_a_mixture_finds_two_clusters() -> None:
    """Held-out likelihood is better for two than for one."""
    assert len(fit_density("gmm", drawn(200, seed=0), seed=1).arrays["weights"]) >= 2


def test_the_distance_is_that_to_the_fifth_neighbour() -> None:
    """In standardised columns."""
    vectors = np.arange(9, dtype=np.float32)[:, None]
    assert fit_density("knn", vectors, seed=0).anomaly(np.array([[0.0]], np.float32)) == pytest.approx(
        4 / vectors.std()
    )


@pytest.mark.parametrize("name", NAMES)
def test_vectors_that_are_all_equal_have_a_density(name: Any) -> None:
    """Nothing is divided by zero; another vector is less likely."""
    found = fit_density(name, np.full((40, 3), 0.1, np.float32), seed=0)
    usual, other = found.anomaly(np.array([[0.1] * 3, [9.0] * 3], np.float32))
    assert np.isfinite([usual, other]).all()
    assert other > usual


@pytest.mark.parametrize("name", NAMES)
def test_too_few_vectors_are_refused(name: Any) -> None:
    """The message says how many are needed."""
    fewest = FEWEST_ITEMS[name]
    with pytest.raises(CohortError, match=f"from: {fewest - 1}, needed: at least {fewest}"):
        fit_density(name, drawn(fewest - 1, seed=0), seed=0)


def test_a_missing_density_is_told_of(tmp_path: Path) -> None:
    """An empty folder is none."""
    with pytest.raises(ModelError, match="is missing"):
        load_density(tmp_path)


def test_a_truncated_file_is_refused(density: Density, tmp_path: Path) -> None:
    """Wherever it was cut off."""
    save_density(density, tmp_path)
    content = (tmp_path / DENSITY).read_bytes()
    for size in (0, 7, len(content) // 2):
        (tmp_path / DENSITY).write_bytes(content[:size])
        with pytest.raises(ModelError, match="is damaged"):
            load_density(tmp_path)


def test_a_file_without_some_of_its_arrays_is_refused(density: Density, tmp_path: Path) -> None:
    """Even where its label is right."""
    label = {"wsi_anomaly": json.dumps({"format_version": 1, "density": density.name})}
    for lacking in ("middle", max(set(density.arrays) - {"middle", "scale"})):
        save_density(density, tmp_path)
        arrays = load_file(tmp_path / DENSITY)
        del arrays[lacking]
        save_file(arrays, tmp_path / DENSITY, label)
        with pytest.raises(ModelError, match="is damaged"):
            load_density(tmp_path)


@pytest.mark.parametrize("label", [{}, {"format_version": 2, "density": "gmm"}, {"format_version": 1, "density": "x"}])
def test_another_format_is_refused(label: dict[str, Any], tmp_path: Path) -> None:
    """It is not guessed at."""
    save_file({"middle": np.zeros(2)}, tmp_path / DENSITY, {"wsi_anomaly": json.dumps(label)})
    with pytest.raises(ModelError, match="reads 1 of gmm, flow, knn"):
        load_density(tmp_path)
