"""Facts about CONCH: its embeddings equal those of its authors' package, and depend on nothing they should not."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from wsi_anomaly.prompts.conch import Conch, ConchEmbedder
from wsi_anomaly.prompts.conch_network import ConchNetwork, ConchSizes
from wsi_anomaly.prompts.conch_random import write_random_conch
from wsi_anomaly.prompts.protocol import Embedder, ImageTextModel

SMALL = ConchSizes(
    embedding=16,
    image_px=32,
    patch_px=8,
    image_width=32,
    image_layers=2,
    image_heads=2,
    text_width=24,
    text_layers=2,
    text_heads=2,
    vocabulary=320,
    context=40,
)
LONG = "An H&E image of nécrosis, far longer than the context of this model"
TEXTS = ["lymphocytes", "", LONG, "a <pad> b", "seventeen bytes 7", "fat"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose tokenizer knows bytes only."""
    folder = tmp_path_factory.mktemp("conch")
    write_random_conch(folder, SMALL, texts=[])
    return folder


@pytest.fixture(scope="module")
def embedder(written: Path) -> ConchEmbedder:
    """The small model, loaded."""
    return load(written)


def load(weights: Path) -> ConchEmbedder:
    """As a run without a network does."""
    return Conch(weights=str(weights)).load(device="cpu", offline=True)


def pattern(count: int, height: int, width: int) -> np.ndarray:
    """Tiles of stripes, each with others."""
    i, y, x, c = np.meshgrid(*map(np.arange, (count, height, width, 3)), indexing="ij")
    return ((x * (i + 3) + y * (2 * i + 5) + 40 * c * (i + 1) + x * y // 7) % 256).astype(np.uint8)


def test_the_small_model_embeds_as_the_authors_package_does(embedder: ConchEmbedder) -> None:
    """The first four numbers of each vector, from conch-fork 0.1.0 with the same weights, pictures and tokens.

    The second pair of tiles is resized and cropped first; the second text is empty, the third is cut.
    """
    tiles = [[-0.15837, -0.28644, 0.35960, 0.14405], [-0.20939, -0.30922, 0.37890, 0.06404]]
    resized = [[-0.15665, -0.28148, 0.35785, 0.28593], [-0.18514, -0.21577, 0.24173, 0.25713]]
    texts = [
        [0.19569, 0.06401, 0.05669, 0.34840],
        [-0.18020, -0.07243, -0.34114, 0.33571],
        [-0.19784, -0.11534, 0.03594, 0.36254],
    ]
    assert embedder.embed_tiles(pattern(2, 32, 32))[:, :4] == pytest.approx(np.array(tiles), abs=1e-4)
    prepared = embedder.prepare(pattern(2, 48, 40))
    assert embedder.embed_tiles(prepared)[:, :4] == pytest.approx(np.array(resized), abs=1e-4)
    assert embedder.embed_texts(TEXTS[:3])[:, :4] == pytest.approx(np.array(texts), abs=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("decoder_layers", [0, 1])
def test_every_embedding_equals_that_of_the_authors_package(
    decoder_layers: int, written: Path, embedder: ConchEmbedder, tmp_path: Path
) -> None:
    """With their preprocessing; the poolers and the decoder that we have no use for are left in the weights."""
    pytest.importorskip("conch", reason="pip install conch-fork to compare with it")
    from wsi_anomaly.torchvision_shim import make_importable

    make_importable()
    theirs, preprocess = authors_model(decoder_layers)
    ours = load_file(written / "model.safetensors")
    left_over = {"visual.attn_pool_caption", "visual.ln_caption"} | ({"text_decoder"} if decoder_layers else set())
    result = theirs.load_state_dict(ours, strict=False)
    assert result.unexpected_keys == []
    assert {re.match(r"(visual\.)?\w+", name)[0] for name in result.missing_keys} == left_over

    folder = Path(shutil.copytree(written, tmp_path / "theirs", ignore=shutil.ignore_patterns("*.safetensors")))
    torch.save({"state_dict": {f"module.{n}": w for n, w in theirs.state_dict().items()}}, folder / "theirs.bin")
    reloaded = load(folder)
    for tiles in (pattern(3, 32, 32), pattern(3, 75, 50), pattern(3, 40, 57), pattern(3, 20, 24)):
        with torch.inference_mode():
            expected = theirs.encode_image(torch.stack([preprocess(Image.fromarray(tile)) for tile in tiles]))
        assert reloaded.embed_tiles(reloaded.prepare(tiles)) == pytest.approx(expected.numpy(), abs=1e-5)
    with torch.inference_mode():
        expected = theirs.encode_text(authors_tokens(folder / "tokenizer.json", TEXTS))
    assert reloaded.embed_texts(TEXTS) == pytest.approx(expected.numpy(), abs=1e-5)
    assert np.array_equal(reloaded.embed_texts(TEXTS), embedder.embed_texts(TEXTS))


def authors_model(decoder_layers: int) -> tuple[torch.nn.Module, Any]:
    """A model of the size `SMALL` made of the authors' classes, and their preprocessing."""
    from conch.open_clip_custom.coca_model import CoCa
    from conch.open_clip_custom.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from conch.open_clip_custom.transform import image_transform

    text = {"context_length": 40, "vocab_size": 320, "width": 24, "heads": 2}
    pools = {"attentional_pool_caption": True, "attentional_pool_contrast": True, "n_queries_caption": 4}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "num_heads": 2, "output_tokens": True}
    model = CoCa(
        embed_dim=16,
        embed_dim_caption=24,
        multimodal_cfg=text | {"layers": decoder_layers},
        text_cfg=text | {"layers": 2, "embed_cls": True, "output_tokens": True},
        vision_cfg=vision | pools,
    )
    return model.eval(), image_transform(32, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)


def authors_tokens(path: Path, texts: list[str]) -> torch.Tensor:
    """As the authors make them, with the column that they reserve for the learned token."""
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<start_of_text>", "eos_token": "<end_of_text>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
    tokens = tokenizer(texts, max_length=39, truncation=True, padding="max_length", return_tensors="pt")["input_ids"]
    return torch.nn.functional.pad(tokens, (0, 1))


def test_conch_v1_has_the_tensors_of_the_released_checkpoint() -> None:
    """326 of 200.5 million numbers, 11 of them in the pooler for captions, which is not built."""
    with torch.device("meta"):
        tensors = ConchNetwork(ConchSizes()).state_dict()
    affine, layer = r"\.(weight|bias)", r"(\d|10|11)"
    patterns = [
        r"logit_scale",
        r"text\.(cls_emb|positional_embedding|text_projection|token_embedding\.weight)",
        rf"text\.(ln_final|transformer\.resblocks\.{layer}\.(ln_1|ln_2|attn\.out_proj|mlp\.c_fc|mlp\.c_proj)){affine}",
        rf"text\.transformer\.resblocks\.{layer}\.attn\.in_proj_(weight|bias)",
        rf"visual\.trunk\.(cls_token|pos_embed|patch_embed\.proj{affine}|norm{affine})",
        rf"visual\.trunk\.blocks\.{layer}\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2){affine}",
        r"visual\.attn_pool_contrast\.(query|attn\.(q|k|v)_proj_weight|attn\.in_proj_bias)",
        rf"visual\.(attn_pool_contrast\.(ln_q|ln_k|attn\.out_proj)|ln_contrast){affine}",
        r"visual\.proj_contrast",
    ]
    assert [name for name in tensors if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []
    caption_pooler = 256 * 768 + 4 * 768 + 4 * 768 * 768 + 4 * 768 + 2 * 768
    assert len(tensors) + 11 == 326
    assert sum(tensor.numel() for tensor in tensors.values()) + caption_pooler == 200_522_497
    assert tensors["visual.trunk.pos_embed"].shape == (1, 785, 768)
    assert tensors["text.positional_embedding"].shape == (128, 768)
    assert tensors["text.token_embedding.weight"].shape == (32007, 768)
    assert tensors["visual.attn_pool_contrast.attn.k_proj_weight"].shape == (512, 768)


def test_it_fulfils_the_protocols(embedder: ConchEmbedder) -> None:
    """So that a stage can use it without knowing it."""
    assert isinstance(Conch(), ImageTextModel)
    assert isinstance(embedder, Embedder)


def test_vectors_are_of_unit_length_and_differ(embedder: ConchEmbedder) -> None:
    """Of tiles and of texts."""
    for vectors in (embedder.embed_tiles(pattern(5, 32, 32)), embedder.embed_texts(TEXTS)):
        assert vectors.dtype == np.float32
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)
        assert np.tril(vectors @ vectors.T, -1).max() < 0.999


def test_no_tiles_and_no_texts_have_no_vectors(embedder: ConchEmbedder) -> None:
    """Instead of failing."""
    assert embedder.embed_tiles(embedder.prepare(pattern(0, 48, 40))).shape == (0, 16)
    assert embedder.embed_texts([]).shape == (0, 16)


@pytest.mark.parametrize(
    ("threads", "changes"),
    [(1, {}), (1, {"image_width": 768}), (2, {"embedding": 64, "image_px": 64, "image_layers": 1, "text_layers": 1})],
)
def test_a_vector_does_not_depend_on_what_it_comes_with(threads: int, changes: dict[str, int], tmp_path: Path) -> None:
    """Bit for bit, also in layers as wide as those of CONCH v1, and where threads share the work."""
    sizes = SMALL.model_copy(update=changes)
    write_random_conch(tmp_path, sizes, texts=[])
    model, tiles = load(tmp_path), pattern(9, sizes.image_px, sizes.image_px)
    torch.set_num_threads(threads)
    together, texts = model.embed_tiles(tiles[::-1].copy())[::-1], model.embed_texts(TEXTS[::-1])[::-1]
    alone = np.concatenate([model.embed_tiles(tiles[[i]]) for i in (0, 3, 8)])
    assert np.array_equal(together, model.embed_tiles(tiles))
    assert np.array_equal(together[[0, 3, 8]], alone)
    assert np.array_equal(texts, np.concatenate([model.embed_texts([text]) for text in TEXTS]))


def test_the_padding_that_is_left_out_changes_nothing(embedder: ConchEmbedder) -> None:
    """A text's vector from the columns it needs is that from all of them."""
    tokens = torch.tensor([embedder.tokenizer.encode(text).ids for text in TEXTS])
    with torch.inference_mode():
        whole = torch.nn.functional.normalize(embedder.network.encode_texts(tokens), dim=-1)
    assert embedder.embed_texts(TEXTS) == pytest.approx(whole.numpy(), abs=1e-6)


def test_a_text_that_is_too_long_ends_as_any_other(embedder: ConchEmbedder) -> None:
    """What is cut is its last words, not the token that says it is over."""
    tokens = embedder.tokenizer.encode(LONG).ids
    assert len(tokens) == 39
    assert (tokens[0], tokens[-1]) == (1, 2)
    assert np.array_equal(*embedder.embed_texts([LONG, LONG + ", and longer"]))


def test_case_and_accents_do_not_count(embedder: ConchEmbedder) -> None:
    """Which the tokenizer decides."""
    assert np.array_equal(*embedder.embed_texts(["Nécrosis", "necrosis"]))


def test_tiles_of_the_right_size_are_not_resized(embedder: ConchEmbedder) -> None:
    """They are handed through as they are."""
    tiles = pattern(2, 32, 32)
    assert embedder.prepare(tiles) is tiles


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu(written: Path, embedder: ConchEmbedder) -> None:
    """Up to half precision."""
    fast = Conch(weights=str(written)).load(device="cuda", offline=True)
    assert fast.embed_tiles(pattern(3, 32, 32)) == pytest.approx(embedder.embed_tiles(pattern(3, 32, 32)), abs=5e-3)
    assert fast.embed_texts(TEXTS) == pytest.approx(embedder.embed_texts(TEXTS), abs=5e-3)
