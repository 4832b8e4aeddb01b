"""Facts about image against reconstruction."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from wsi_anomaly.detectors.residuals import ms_ssim, mse, squared_error_map, tile_means
from wsi_anomaly.errors import OptionsError

Pair = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
EVERY_SIZE = pytest.mark.parametrize("tile_px", [64, 128, 256])


@pytest.fixture
def pair(picture: np.ndarray) -> Pair:
    """Two tiles of a side in px, fringes on waves, and the same two as a poor network might rebuild them: blurred."""
    pixels = picture.astype(np.int64) // 2 + picture.astype(np.int64) ** 2 % 128
    rebuilt = 0.9 * gaussian_filter(np.roll(pixels, 1, axis=1).astype(np.float64), (1, 1, 0)) + 20

    def tiles(side_px: int) -> tuple[torch.Tensor, torch.Tensor]:
        squares = [
            np.stack([image[start:, start:][:side_px, :side_px] for start in (0, 300)]) for image in (pixels, rebuilt)
        ]
        images, others = (torch.from_numpy(square / 255).float().permute(0, 3, 1, 2) for square in squares)
        return images, others

    return tiles


def noisy(images: torch.Tensor, deviation: float) -> torch.Tensor:
    """The images with the same noise, more or less of it."""
    return images + deviation * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def ms_ssim_by_the_book(image: np.ndarray, rebuilt: np.ndarray) -> float:
    """The same score of one colour of one tile, written once more with other tools."""
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    scales = next(count for count in (5, 4, 3, 2, 1) if np.ceil(min(image.shape) / 2 ** (count - 1)) >= 11)
    product = 1.0
    for scale in range(scales):

        def blurred(values: np.ndarray) -> np.ndarray:
            return gaussian_filter(values, 1.5, radius=5)[5:-5, 5:-5]

        mean, other_mean = blurred(image), blurred(rebuilt)
        deviation_a, deviation_b = blurred(image**2) - mean**2, blurred(rebuilt**2) - other_mean**2
        terms = (2 * (blurred(image * rebuilt) - mean * other_mean) + 9e-4) / (deviation_a + deviation_b + 9e-4)
        if scale == scales - 1:
            terms = terms * (2 * mean * other_mean + 1e-4) / (mean**2 + other_mean**2 + 1e-4)
        product *= max(terms.mean(), 0) ** (weights[scale] * sum(weights) / sum(weights[:scales]))
        image, rebuilt = halved(image), halved(rebuilt)
    return 1 - product


def halved(image: np.ndarray) -> np.ndarray:
    """Means of four pixels, with an odd last row and column doubled."""
    even = np.pad(image, [(0, side % 2) for side in image.shape], mode="edge")
    return (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4


def test_the_squared_error_of_a_pixel_is_the_mean_over_its_colours() -> None:
    """A pixel that is off by 0.3 in one of three colours has an error of 0.03."""
    images = torch.zeros(1, 3, 2, 2)
    rebuilt = images.clone()
    rebuilt[0, 1, 0, 1] = 0.3
    assert squared_error_map(images, rebuilt)[0].numpy() == pytest.approx(np.array([[0, 0.03], [0, 0]]))


def test_equal_images_are_not_apart() -> None:
    """The error of a perfect reconstruction is zero."""
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not squared_error_map(images, images).any()


def test_the_mean_of_a_map_does_not_depend_on_the_other_maps() -> None:
    """Bit for bit: sums of many at once may be taken in another order."""
    maps = np.random.default_rng(0).random((9, 96, 96), np.float32)
    assert [tile_means(one[None])[0] for one in maps] == tile_means(maps).tolist()


def test_the_mean_of_a_large_map_is_not_rounded_away() -> None:
    """Sixteen million small errors still count beside a big one."""
    one = np.full((1, 4096, 4096), 1e-4, np.float32)
    one[0, 0, 0] = 1e4
    assert tile_means(one)[0] == pytest.approx(1e-4 + 1e4 / 4096**2, rel=1e-6)


def test_no_maps_have_no_means() -> None:
    """An empty batch is no special case."""
    assert tile_means(np.zeros((0, 4, 4), np.float32)).shape == (0,)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 32, 32), (2, 16)])
def test_the_mean_squared_error_is_over_all_that_belongs_to_a_tile(shape: tuple[int, ...]) -> None:
    """Colours and pixels, the channels of a latent, or the numbers of a vector."""
    images = torch.zeros(shape)
    rebuilt = images.clone()
    rebuilt[1] = torch.linspace(-1, 1, rebuilt[1].numel()).reshape(shape[1:])
    expected = np.square(np.linspace(-1, 1, rebuilt[1].numel())).mean()
    assert mse(images, rebuilt).tolist() == pytest.approx([0, expected])


def test_the_mean_squared_error_is_the_mean_of_its_map(pair: Pair) -> None:
    """Score and map tell the same."""
    images, rebuilt = pair(64)
    assert mse(images, rebuilt).numpy() == pytest.approx(tile_means(squared_error_map(images, rebuilt).numpy()))


@EVERY_SIZE
@pytest.mark.parametrize("score", [mse, ms_ssim])
def test_equal_images_score_zero(score: Callable[..., torch.Tensor], tile_px: int, pair: Pair) -> None:
    """Exactly, structured tiles and blank ones."""
    images, _ = pair(tile_px)
    images[1] = 0.95
    assert score(images, images.clone()).tolist() == [0, 0]


@pytest.mark.parametrize("score", [mse, ms_ssim])
def test_the_worse_the_reconstruction_the_higher_the_score(score: Callable[..., torch.Tensor], pair: Pair) -> None:
    """More noise, and more blur, each tile of the batch."""
    images, _ = pair(64)
    with_noise = [score(images, noisy(images, deviation)) for deviation in (0, 0.01, 0.03, 0.1, 0.3)]
    with_blur = [
        score(images, torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sigma, sigma))))
        for sigma in (0, 0.5, 1, 2, 4)
    ]
    for scores in (torch.stack(with_noise), torch.stack(with_blur)):
        assert (scores.diff(dim=0) > 0).all()


@EVERY_SIZE
@pytest.mark.parametrize("score", [mse, ms_ssim])
def test_scores_are_symmetric_and_of_each_tile_alone(
    score: Callable[..., torch.Tensor], tile_px: int, pair: Pair
) -> None:
    """Neither which image is the reconstruction nor what else is in the batch matters."""
    images, rebuilt = pair(tile_px)
    scores = score(images, rebuilt).tolist()
    assert score(rebuilt, images).tolist() == pytest.approx(scores, abs=1e-6)
    alone = [score(images[[i]], rebuilt[[i]]).item() for i in range(len(images))]
    assert alone == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize("score", [mse, ms_ssim])
def test_no_tiles_have_no_scores(score: Callable[..., torch.Tensor]) -> None:
    """An empty batch is no special case here either."""
    assert score(torch.zeros(0, 3, 64, 64), torch.zeros(0, 3, 64, 64)).shape == (0,)


def test_with_one_scale_the_similarity_is_that_of_scikit_image(pair: Pair) -> None:
    """Tiles below 21 px have one, weighted by the sum of all; windows that reach over the border do not count."""
    images, rebuilt = pair(20)
    expected = []
    for image, other in zip(images.numpy(), rebuilt.numpy(), strict=True):
        _, similarities = structural_similarity(
            image.astype(float),
            other.astype(float),
            channel_axis=0,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        expected.append(1 - (similarities[:, 5:-5, 5:-5].mean(axis=(1, 2)) ** 1.0001).mean())
    assert ms_ssim(images, rebuilt).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("tile_px", [11, 21, 40, 41, 64, 81, 100, 160, 161, 256])
def test_with_more_scales_the_similarity_is_the_one_of_the_paper(tile_px: int, pair: Pair) -> None:
    """At every size where another scale finds room, and where halving leaves a row over."""
    images, rebuilt = pair(tile_px)
    expected = [
        np.mean([ms_ssim_by_the_book(*colours) for colours in zip(image, other, strict=True)])
        for image, other in zip(images.double().numpy(), rebuilt.double().numpy(), strict=True)
    ]
    assert ms_ssim(images, rebuilt).tolist() == pytest.approx(expected, abs=1e-6)


def test_tiles_need_not_be_square(pair: Pair) -> None:
    """The shorter side decides how many scales there are."""
    images, rebuilt = (part[..., :50] for part in pair(128))
    expected = ms_ssim_by_the_book(images[0, 0].double().numpy(), rebuilt[0, 0].double().numpy())
    assert ms_ssim(images[:1, :1], rebuilt[:1, :1]).item() == pytest.approx(expected, abs=1e-6)


def test_five_scales_give_the_values_that_pytorch_msssim_gave(pair: Pair) -> None:
    """Version 1.0.0, in float64."""
    assert ms_ssim(*pair(256)).tolist() == pytest.approx([0.165865, 0.168236], abs=2e-6)


def test_five_scales_give_the_values_of_pytorch_msssim(pair: Pair) -> None:
    """Where that package is installed."""
    package = pytest.importorskip("pytorch_msssim")
    images, rebuilt = pair(256)
    expected = 1 - package.ms_ssim(images.double(), rebuilt.double(), data_range=1, size_average=False)
    assert ms_ssim(images, rebuilt).tolist() == pytest.approx(expected.tolist(), abs=2e-6)


def test_what_is_the_opposite_scores_one_and_no_more() -> None:
    """A negative similarity would have no fractional power."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert ms_ssim(images, 1 - images).tolist() == [1, 1]


def test_small_differences_of_smooth_tiles_are_not_lost_in_rounding() -> None:
    """Blank glass with a trace of noise: computed in float32, the score would be negative."""
    blank = torch.full((1, 3, 256, 256), 0.95)
    rebuilt = noisy(blank, 3e-4)
    expected = ms_ssim_by_the_book(blank[0, 0].double().numpy(), rebuilt[0, 0].double().numpy())
    assert 0 < expected < 1e-4
    assert ms_ssim(blank[:, :1], rebuilt[:, :1]).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("width_px", "height_px"), [(10, 64), (64, 10), (1, 1)])
def test_tiles_smaller_than_the_window_are_refused(width_px: int, height_px: int) -> None:
    """The message says how large they are and how large they must be."""
    tiles = torch.zeros(1, 3, height_px, width_px)
    with pytest.raises(OptionsError, match=f"{width_px} x {height_px} px: the score ms_ssim needs at least 11 px"):
        ms_ssim(tiles, tiles)
