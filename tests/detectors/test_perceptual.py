"""Facts about LPIPS, on weights drawn at random: the real ones are not in the repository."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter

from wsi_anomaly.detectors.perceptual import Lpips, load_lpips
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.torchvision_shim import make_importable

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]
Pair = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiles this small are fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Convolutions that keep the size of their input, and heads from 0 to 1."""
    random = np.random.default_rng(0)
    drawn = {}
    for name, tensor in Lpips().state_dict().items():
        numbers = random.random(tuple(tensor.shape), np.float32)
        if name.startswith("features."):
            numbers = (2 * numbers - 1) * np.sqrt(6 / np.prod(tensor.shape[1:]), dtype=np.float32)
        drawn[name] = torch.from_numpy(numbers * (0.1 if name.endswith("bias") else 1)).float()
    return drawn


@pytest.fixture(scope="module")
def folder(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files as they are published: VGG16 with its classifier, the heads for themselves."""
    folder = tmp_path_factory.mktemp("lpips")
    network = {name: tensor for name, tensor in weights.items() if name.startswith("features.")}
    torch.save(network | {"classifier.6.bias": torch.zeros(1000)}, folder / "vgg16-397923af.pth")
    torch.save({name: tensor for name, tensor in weights.items() if name not in network}, folder / "vgg.pth")
    (folder / "README.md").write_text("Where the weights come from.")
    return folder


@pytest.fixture(scope="module")
def lpips(folder: Path) -> Lpips:
    """The network with the drawn weights."""
    return load_lpips(folder, device=CPU)


@pytest.fixture
def pair(picture: np.ndarray) -> Pair:
    """Two tiles of a side in px, fringes on waves, and the same two as a poor network might rebuild them: shifted."""
    pixels = picture.astype(np.int64) // 2 + picture.astype(np.int64) ** 2 % 128

    def tiles(side_px: int) -> tuple[torch.Tensor, torch.Tensor]:
        squares = np.stack([pixels[start:, start:][:side_px, :side_px] for start in (0, 300)])
        images = torch.from_numpy(squares / 255).float().permute(0, 3, 1, 2)
        return images, 0.9 * images.roll(1, dims=3)

    return tiles


def empty_weights() -> Weights:
    """Zeros that take no room in a file."""
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in meta_weights().items()}


def meta_weights() -> Weights:
    """Names and shapes only."""
    with torch.device("meta"):
        return Lpips().state_dict()


def test_the_network_is_vgg16_with_five_heads() -> None:
    """Fourteen million weights before the classifier, and one head for the width of each block."""
    weights = meta_weights()
    assert sum(tensor.numel() for name, tensor in weights.items() if name.startswith("features.")) == 14_714_688
    heads = {name: list(tensor.shape) for name, tensor in weights.items() if not name.startswith("features.")}
    assert heads == {
        f"lin{block}.model.1.weight": [1, width, 1, 1] for block, width in enumerate([64, 128, 256, 512, 512])
    }


def test_equal_images_score_zero(lpips: Lpips, pair: Pair) -> None:
    """Exactly, structured tiles and blank ones."""
    images, _ = pair(64)
    images[1] = 0.95
    assert lpips(images, images.clone()).tolist() == [0, 0]


def test_the_worse_the_reconstruction_the_higher_the_score(lpips: Lpips, pair: Pair) -> None:
    """More noise, and more blur, each tile of the batch."""
    images, _ = pair(64)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    with_noise = [lpips(images, images + deviation * noise) for deviation in (0, 0.01, 0.1, 0.5)]
    with_blur = [
        lpips(images, torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sigma, sigma))))
        for sigma in (0, 0.5, 1, 4)
    ]
    for scores in (torch.stack(with_noise), torch.stack(with_blur)):
        assert (scores.diff(dim=0) > 0).all()


@pytest.mark.parametrize("tile_px", [16, 50, 64])
def test_scores_are_symmetric_and_of_each_tile_alone(tile_px: int, lpips: Lpips, pair: Pair) -> None:
    """Neither which image is the reconstruction nor what else is in the batch matters."""
    images, rebuilt = pair(tile_px)
    scores = lpips(images, rebuilt).tolist()
    assert lpips(rebuilt, images).tolist() == pytest.approx(scores, abs=1e-6)
    alone = [lpips(images[[i]], rebuilt[[i]]).item() for i in range(len(images))]
    assert alone == pytest.approx(scores, abs=1e-6)


def test_the_order_of_numbers_in_memory_does_not_matter(lpips: Lpips, pair: Pair) -> None:
    """Tiles come as channels_last from pixels, and as rows of one colour from a decoder."""
    images, rebuilt = pair(64)
    turned = images.contiguous(memory_format=torch.channels_last)
    assert lpips(turned, rebuilt.contiguous()).tolist() == pytest.approx(lpips(images, rebuilt).tolist(), rel=1e-5)


def test_no_tiles_have_no_scores(lpips: Lpips) -> None:
    """An empty batch is no special case."""
    assert lpips(torch.zeros(0, 3, 64, 64), torch.zeros(0, 3, 64, 64)).shape == (0,)


def test_the_values_are_those_that_the_package_lpips_gave(lpips: Lpips, pair: Pair) -> None:
    """Version 0.1.4, on the same drawn weights."""
    assert lpips(*pair(64)).tolist() == pytest.approx([0.409392, 0.355945], rel=1e-5)


def test_the_values_are_those_of_the_package_lpips(lpips: Lpips, weights: Weights, pair: Pair) -> None:
    """Where it is installed; at sizes that halve evenly and at one that does not."""
    make_importable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in a way that is going away
        package = pytest.importorskip("lpips")
        theirs = package.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    heads = {name: tensor for name, tensor in weights.items() if name.startswith("lin")}
    theirs.load_state_dict(heads, strict=False)
    names = {name: f"features.{name.split('.', 1)[1]}" for name in theirs.net.state_dict()}  # slice1.0.weight
    theirs.net.load_state_dict({name: weights[ours] for name, ours in names.items()})
    for tile_px in (64, 50):
        images, rebuilt = pair(tile_px)
        expected = theirs(images, rebuilt, normalize=True).flatten()
        assert lpips(images, rebuilt).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_one_file_of_both_in_half_precision_will_do(lpips: Lpips, weights: Weights, tmp_path: Path, pair: Pair) -> None:
    """It is computed in single precision all the same, and differs by the rounding of the weights only."""
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "lpips.safetensors")
    scores = load_lpips(str(tmp_path / "lpips.safetensors"), device=CPU)(*pair(64))
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(lpips(*pair(64)).tolist(), rel=1e-2)


def test_weights_stay_when_their_file_changes(tmp_path: Path) -> None:
    """Nothing is a view of the file."""
    path = tmp_path / "lpips.pth"
    torch.save(empty_weights() | {"features.0.bias": torch.ones(64)}, path)
    network = load_lpips(path, device=CPU)
    path.write_bytes(bytes(path.stat().st_size))
    assert network.features[0].bias.tolist() == [1] * 64


def test_a_loaded_network_does_not_learn(lpips: Lpips) -> None:
    """It measures."""
    assert not lpips.training
    assert not any(weights.requires_grad for weights in lpips.parameters())


@pytest.mark.parametrize(("width_px", "height_px"), [(15, 64), (64, 15)])
def test_tiles_that_cannot_be_halved_four_times_are_refused(width_px: int, height_px: int, lpips: Lpips) -> None:
    """The message says how large they are and how large they must be."""
    tiles = torch.zeros(1, 3, height_px, width_px)
    with pytest.raises(OptionsError, match=f"{width_px} x {height_px} px: the score lpips needs at least 16 px"):
        lpips(tiles, tiles)


@pytest.mark.parametrize("nothing", [None, ""])
def test_without_weights_the_message_says_which_files_and_whence(nothing: str | None) -> None:
    """Both files by name, and who publishes them."""
    with pytest.raises(ModelError, match=r"no weights are given.*vgg16-397923af.pth.*lpips/weights/v0.1/vgg.pth"):
        load_lpips(nothing, device=CPU)


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    """With the same help."""
    with pytest.raises(ModelError, match=r"nowhere: the weights of LPIPS are missing.*torchvision.*the Python package"):
        load_lpips(tmp_path / "nowhere", device=CPU)


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ("features.", "holds no linear heads"),
        ("lin", "holds no features of VGG16"),
        ("nothing", "holds no features of VGG16 and no linear heads"),
    ],
)
def test_half_of_the_weights_is_not_enough(left: str, message: str, tmp_path: Path) -> None:
    """The message says which half is missing."""
    torch.save({"classifier.6.bias": torch.zeros(1000)}, tmp_path / "classifier.pth")
    if part := {name: tensor for name, tensor in empty_weights().items() if name.startswith(left)}:
        torch.save(part, tmp_path / "part.pth")
    with pytest.raises(ModelError, match=f"{message}. LPIPS needs the weights of two files"):
        load_lpips(tmp_path, device=CPU)


def test_an_empty_folder_holds_no_weights(tmp_path: Path) -> None:
    """Other files than weights are not looked at."""
    (tmp_path / "vgg16.txt").write_text("to be downloaded")
    with pytest.raises(ModelError, match="holds no features of VGG16 and no linear heads"):
        load_lpips(tmp_path, device=CPU)


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    """Missing ones, others of another shape, and some of which VGG16 has none."""
    others = empty_weights()
    del others["features.17.weight"]
    others |= {"lin1.model.1.weight": torch.zeros(1, 192, 1, 1), "lin5.model.1.weight": torch.zeros(1, 384, 1, 1)}
    torch.save(others, tmp_path / "other.pth")
    with pytest.raises(
        ModelError,
        match=r"missing \(features.17.weight\).*unexpected \(lin5.model.1.weight\).*"
        r"lin1.model.1.weight is \[1, 192, 1, 1\], not \[1, 128, 1, 1\].*LPIPS needs the weights of two files",
    ):
        load_lpips(tmp_path, device=CPU)


def test_heads_of_two_networks_in_one_folder_are_refused(tmp_path: Path) -> None:
    """The message names both files: which one is meant cannot be told."""
    torch.save(empty_weights(), tmp_path / "vgg.pth")
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "alex.pth")
    with pytest.raises(ModelError, match=r"both alex.pth and vgg.pth hold lin0.model.1.weight. Leave only"):
        load_lpips(tmp_path, device=CPU)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    """The one of the two that is damaged."""
    torch.save(empty_weights(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cut.pth: is damaged"):
        load_lpips(tmp_path, device=CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu(folder: Path, lpips: Lpips, pair: Pair) -> None:
    """To what single precision allows."""
    images, rebuilt = pair(64)
    cuda = torch.device("cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        scores = load_lpips(folder, device=cuda)(images.to(cuda), rebuilt.to(cuda))
    assert scores.tolist() == pytest.approx(lpips(images, rebuilt).tolist(), rel=1e-4)
