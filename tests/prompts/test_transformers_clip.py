"""Facts about CLIP models in the files of transformers: a small one with random weights, as transformers saves it."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from wsi_anomaly.errors import ModelError
from wsi_anomaly.prompts.openclip import OpenClip
from wsi_anomaly.prompts.protocol import Embedder

TEXTS = ["clear cell", "a very long phrase " * 9, "", "nodule"]
WEIGHTS = "model.safetensors"
REPOSITORY = "somebody/tiny-plip"
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with the files of a repository."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("plip")
    words = ["<pad>", "<unk>", "<start>", "<end>", "clear", "cell", "a", "very", "long", "phrase", "nodule"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<start>", 2), ("<end>", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(place)
    text = {
        "vocab_size": len(words),
        "max_position_embeddings": 12,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=TOWER | text, vision_config=TOWER | vision, projection_dim=16)).save_pretrained(
        place
    )
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(place)
    return place


def copied(folder: Path, place: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(folder, place / "copy"))


def tiles(count: int, size_px: int = 48) -> np.ndarray:
    """Noise."""
    return np.random.default_rng(3).integers(0, 256, (count, size_px, size_px, 3), np.uint8)


def loaded(folder: Path) -> Embedder:
    """The model in a folder, by this package."""
    return OpenClip(model=f"transformers:{folder}").load(device="cpu", offline=True)


def digest(folder: Path) -> str:
    """Of the model in a folder."""
    return OpenClip(model=f"transformers:{folder}").digest(offline=True)


@pytest.mark.parametrize("size_px", [32, 48, 20])
def test_embeddings_are_those_of_transformers(folder: Path, size_px: int) -> None:
    """With the preprocessing, the tokenizer and the context length of the model, for tiles of any size."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model, pixels = CLIPModel.from_pretrained(folder).eval(), tiles(3, size_px)
    processor, tokenizer = (
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.inference_mode():
        images = processor([Image.fromarray(tile) for tile in pixels], return_tensors="pt")
        texts = tokenizer(TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
        of_tiles = model.get_image_features(pixel_values=images["pixel_values"]).pooler_output
        of_texts = model.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output
    ours = loaded(folder)
    assert isinstance(ours, Embedder)
    expected_tiles, expected_texts = (torch.nn.functional.normalize(one).numpy() for one in (of_tiles, of_texts))
    assert ours.embed_tiles(ours.prepare(pixels)) == pytest.approx(expected_tiles, abs=1e-6)
    assert ours.embed_texts(TEXTS) == pytest.approx(expected_texts, abs=1e-6)


def test_vectors_have_unit_length_and_float32(folder: Path) -> None:
    """Tiles and texts, also where there are none."""
    model = loaded(folder)
    for vectors in (model.embed_tiles(model.prepare(tiles(11))), model.embed_texts(TEXTS * 3)):
        assert vectors.dtype == np.float32
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)
    assert model.embed_tiles(model.prepare(tiles(0))).shape == model.embed_texts([]).shape == (0, 16)


@pytest.mark.parametrize("threads", [2, 1])
def test_a_vector_does_not_depend_on_what_comes_with_it(threads: int, folder: Path) -> None:
    """Bit for bit, in any order, also where threads share the work."""
    torch.set_num_threads(threads)
    model, texts = loaded(folder), TEXTS * 3
    prepared = model.prepare(tiles(11))
    together = model.embed_tiles(prepared)
    assert np.array_equal(model.embed_tiles(prepared[::-1].copy())[::-1], together)
    assert np.array_equal(np.concatenate([model.embed_tiles(prepared[[i]]) for i in range(11)]), together)
    together = model.embed_texts(texts)
    assert np.array_equal(model.embed_texts(texts[::-1])[::-1], together)
    assert np.array_equal(np.concatenate([model.embed_texts([text]) for text in texts]), together)


def test_a_pickle_of_an_older_version_gives_the_same_vectors(folder: Path, tmp_path: Path) -> None:
    """With the counted positions that such files hold. Where there are both, safetensors are read."""
    copy, expected = copied(folder, tmp_path), loaded(folder).embed_texts(TEXTS)
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(12)[None] for tower in ("text", "vision")}
    (copy / "pytorch_model.bin").write_bytes(b"damaged")
    assert np.array_equal(loaded(copy).embed_texts(TEXTS), expected)
    torch.save(load_file(copy / WEIGHTS) | positions, copy / "pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    assert np.array_equal(loaded(copy).embed_texts(TEXTS), expected)


def test_half_precision_weights_are_computed_with_in_full(folder: Path, tmp_path: Path) -> None:
    """On the CPU half precision is slow, and coarse."""
    copy = copied(folder, tmp_path)
    save_file({name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}, copy / WEIGHTS)
    vectors = loaded(copy).embed_texts(TEXTS)
    assert vectors == pytest.approx(loaded(folder).embed_texts(TEXTS), abs=2e-3)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)


def test_a_cached_repository_is_the_same_model_as_its_folder(
    folder: Path, hub_cache: Callable[[str, Path], None]
) -> None:
    """Named as on the hub, as a folder, or carried to another place."""
    hub_cache(REPOSITORY, folder)
    cached = OpenClip(model=REPOSITORY)
    assert cached.digest(offline=True) == cached.digest(offline=False) == digest(folder)
    assert OpenClip(model="not/here").at(str(folder)).digest(offline=True) == digest(folder)
    vectors = cached.load(device="cpu", offline=True).embed_texts(TEXTS)
    assert np.array_equal(vectors, loaded(folder).embed_texts(TEXTS))


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json", "preprocessor_config.json"])
def test_offline_a_cached_repository_that_lacks_a_file_is_refused_at_once(
    file: str, folder: Path, tmp_path: Path, hub_cache: Callable[[str, Path], None]
) -> None:
    """Another program may have fetched only what it needed itself."""
    copy = copied(folder, tmp_path)
    (copy / file).unlink()
    hub_cache(REPOSITORY, copy)
    with pytest.raises(ModelError, match=f"{REPOSITORY}: .*--offline.*'transformers:/path/to/folder'"):
        OpenClip(model=REPOSITORY).digest(offline=True)


def test_the_digest_is_of_contents(folder: Path, tmp_path: Path) -> None:
    """Not of the place, nor of files that decide nothing; of each that does."""
    copy = copied(folder, tmp_path)
    (copy / "README.md").write_text("other words")
    digests = {digest(folder), digest(copy)}
    assert len(digests) == 1
    for file in (WEIGHTS, "config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        with (copy / file).open("a") as stream:
            stream.write("\n")
        digests.add(digest(copy))
    assert len(digests) == 6


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "config.json: is missing"),
        (WEIGHTS, "lacks model.safetensors or pytorch_model.bin"),
        ("tokenizer.json", "lacks tokenizer.json"),
        ("preprocessor_config.json", "lacks preprocessor_config.json"),
    ],
)
def test_a_missing_file_is_named(file: str, message: str, folder: Path, tmp_path: Path) -> None:
    """Before anything is computed."""
    copy = copied(folder, tmp_path)
    (copy / file).unlink()
    with pytest.raises(ModelError, match=f"{copy}.*{message}"):
        digest(copy)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json: is damaged"),
        ("config.json", '{"model_type": "bert"}', "no CLIP model.*'bert'.*hf-hub:owner/name"),
        ("config.json", '{"model_type": "clip", "text_config": {"hidden_size": "wide"}}', "config.json"),
        ("preprocessor_config.json", "{", "cannot read preprocessor_config.json"),
        ("tokenizer.json", "{", "cannot read the tokenizer"),
        (WEIGHTS, "short", f"{WEIGHTS}: is damaged"),
    ],
)
def test_a_damaged_file_is_named(file: str, content: str, message: str, folder: Path, tmp_path: Path) -> None:
    """With what is wrong and what to do."""
    copy = copied(folder, tmp_path)
    (copy / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        loaded(copy)


def test_weights_of_another_architecture_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    """The message names the tensors that differ."""
    copy = copied(folder, tmp_path)
    weights = load_file(folder / WEIGHTS)
    weights["nonsense"] = weights.pop("visual_projection.weight")
    save_file(weights, copy / WEIGHTS)
    with pytest.raises(ModelError, match=r"another architecture.*visual_projection.weight.*nonsense"):
        loaded(copy)


def test_a_pickle_that_carries_code_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    """Although transformers is asked for the rest."""

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    copy = copied(folder, tmp_path)
    (copy / WEIGHTS).unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"logit_scale": Code()}))
    with pytest.raises(ModelError, match="carries"):
        loaded(copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "preprocessor_config.json"])
def test_code_that_comes_with_a_model_is_never_run(file: str, folder: Path, tmp_path: Path) -> None:
    """Without a question at the terminal: what is loaded is the library's own class, or nothing."""
    copy = copied(folder, tmp_path)
    (copy / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    table = json.loads((copy / file).read_text())
    kind = "AutoTokenizer" if "tokenizer" in file else "AutoImageProcessor"
    reference = ["theirs.Theirs", "theirs.Theirs"] if "tokenizer" in file else "theirs.Theirs"
    (copy / file).write_text(json.dumps(table | {"auto_map": {kind: reference}}))
    assert loaded(copy).embed_texts(TEXTS).shape == (4, 16)
    assert not (tmp_path / "ran").exists()


def test_preprocessing_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """The message says both sizes."""
    copy = copied(folder, tmp_path)
    table = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(table | {"crop_size": {"height": 24, "width": 28}}))
    with pytest.raises(ModelError, match=r"28 x 24 px.*32 x 32 px"):
        loaded(copy)


def test_a_folder_that_does_not_exist_is_refused() -> None:
    """By name."""
    with pytest.raises(ModelError, match="/nowhere: is no folder"):
        digest(Path("/nowhere"))
