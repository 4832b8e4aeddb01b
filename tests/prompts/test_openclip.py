"""Facts about models of open_clip: small ones with random weights, in the files that open_clip itself reads."""

import json
import os
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

from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.prompts.openclip import OpenClip
from wsi_anomaly.prompts.protocol import Embedder, ImageTextModel

TEXTS = ["clear cell", "a very long phrase about lymphocytes and follicles " * 9, "", "Nodule?"]
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
REPOSITORY = "somebody/tiny-clip"
TEXT_REPOSITORY = "somebody/tiny-bert"

NATIVE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""As QuiltNet: towers and tokenizer are open_clip's own."""
REFERRING = {
    "embed_dim": 16,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
    "text_cfg": {
        "hf_model_name": TEXT_REPOSITORY,
        "hf_tokenizer_name": TEXT_REPOSITORY,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 12,
    },
}
"""As BiomedCLIP: towers of timm and transformers, text tower and tokenizer named by another repository."""
PREPROCESSING = {
    "mean": [0.6, 0.5, 0.4],
    "std": [0.2, 0.3, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose towers are open_clip's own."""
    import open_clip

    folder = tmp_path_factory.mktemp("native")
    torch.manual_seed(0)
    return saved(open_clip.CLIP(**NATIVE), NATIVE, folder)


@pytest.fixture(scope="module")
def text_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config and the tokenizer of a small BERT, without weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("text")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "clear", "cell", "a", "very", "long", "phrase", "Nodule", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def referring(tmp_path_factory: pytest.TempPathFactory, text_repository: Path) -> Path:
    """A folder with a model whose text tower and tokenizer are named by another repository."""
    import open_clip

    folder = tmp_path_factory.mktemp("referring")
    text = REFERRING["text_cfg"] | {"hf_model_name": str(text_repository), "hf_model_pretrained": False}
    torch.manual_seed(1)
    return saved(open_clip.CustomTextCLIP(**REFERRING | {"text_cfg": text}), REFERRING, folder)


def saved(network: torch.nn.Module, config: dict[str, Any], folder: Path) -> Path:
    """The folder, with the files of a repository for open_clip."""
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESSING}))
    save_file(network.state_dict(), folder / WEIGHTS)
    return folder


def copied(folder: Path, place: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(folder, place / "copy"))


def changed(folder: Path, **sections: Any) -> None:
    """Another config in a folder, section by section."""
    table = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(table | sections))


def tiles(count: int, size_px: int = 48) -> np.ndarray:
    """Noise."""
    return np.random.default_rng(3).integers(0, 256, (count, size_px, size_px, 3), np.uint8)


def loaded(folder: Path) -> Embedder:
    """The model in a folder, by this package."""
    return OpenClip(model=f"local-dir:{folder}").load(device="cpu", offline=True)


def of_open_clip(folder: Path, pixels: np.ndarray, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of tiles and texts, by open_clip alone."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.inference_mode():
        images = torch.stack([preprocess(Image.fromarray(tile)) for tile in pixels])
        of_tiles, of_texts = (
            model.encode_image(images, normalize=True),
            model.encode_text(tokenizer(texts), normalize=True),
        )
    return of_tiles.numpy(), of_texts.numpy()


def test_it_is_an_image_text_model(native: Path) -> None:
    """By the protocols."""
    model = OpenClip(model=f"local-dir:{native}")
    assert isinstance(model, ImageTextModel)
    assert isinstance(model.load(device="cpu", offline=True), Embedder)


@pytest.mark.parametrize("size_px", [32, 48, 20])
def test_embeddings_are_those_of_open_clip(native: Path, size_px: int) -> None:
    """With the preprocessing, the tokenizer and the context length of the model, for tiles of any size."""
    ours, pixels = loaded(native), tiles(3, size_px)
    of_tiles, of_texts = of_open_clip(native, pixels, TEXTS)
    assert ours.embed_tiles(ours.prepare(pixels)) == pytest.approx(of_tiles, abs=1e-6)
    assert ours.embed_texts(TEXTS) == pytest.approx(of_texts, abs=1e-6)


def test_embeddings_with_towers_of_other_libraries_are_those_of_open_clip(
    referring: Path, text_repository: Path, tmp_path: Path
) -> None:
    """Although open_clip itself would ask the network what the text tower is like."""
    folder = copied(referring, tmp_path)
    shutil.copytree(text_repository, folder / TEXT_REPOSITORY)
    ours, pixels = loaded(folder), tiles(3)
    shutil.copytree(text_repository, folder, dirs_exist_ok=True)
    text = REFERRING["text_cfg"] | {"hf_model_name": str(text_repository)}
    changed(folder, model_cfg=REFERRING | {"text_cfg": text})
    of_tiles, of_texts = of_open_clip(folder, pixels, TEXTS)
    assert ours.embed_tiles(ours.prepare(pixels)) == pytest.approx(of_tiles, abs=1e-6)
    assert ours.embed_texts(TEXTS) == pytest.approx(of_texts, abs=1e-6)


def test_vectors_have_unit_length_and_float32(native: Path) -> None:
    """Tiles and texts, also where there are none."""
    model = loaded(native)
    for vectors in (model.embed_tiles(model.prepare(tiles(11))), model.embed_texts(TEXTS * 3)):
        assert vectors.dtype == np.float32
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)
    assert model.embed_tiles(model.prepare(tiles(0))).shape == model.embed_texts([]).shape == (0, 16)


@pytest.mark.parametrize("threads", [2, 1])
def test_a_vector_does_not_depend_on_what_comes_with_it(threads: int, native: Path) -> None:
    """Bit for bit, in any order, also where threads share the work."""
    torch.set_num_threads(threads)
    model, texts = loaded(native), [f"nodule {i}" for i in range(11)]
    prepared = model.prepare(tiles(11))
    together = model.embed_tiles(prepared)
    assert np.array_equal(model.embed_tiles(prepared[::-1].copy())[::-1], together)
    assert np.array_equal(np.concatenate([model.embed_tiles(prepared[[i]]) for i in range(11)]), together)
    together = model.embed_texts(texts)
    assert np.array_equal(model.embed_texts(texts[::-1])[::-1], together)
    assert np.array_equal(np.concatenate([model.embed_texts([text]) for text in texts]), together)


def test_loading_leaves_the_random_state_alone(native: Path) -> None:
    """The weights that are drawn first are thrown away."""
    state = torch.get_rng_state()
    loaded(native)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pickle_gives_the_same_vectors_as_safetensors(native: Path, tmp_path: Path) -> None:
    """Where there are both, safetensors are read."""
    folder, pixels = copied(native, tmp_path), tiles(2)
    expected = loaded(native).embed_tiles(loaded(native).prepare(pixels))
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"damaged")
    assert np.array_equal(loaded(folder).embed_tiles(loaded(folder).prepare(pixels)), expected)
    torch.save(load_file(folder / WEIGHTS), folder / "open_clip_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert np.array_equal(loaded(folder).embed_tiles(loaded(folder).prepare(pixels)), expected)


def test_a_cached_repository_is_the_same_model_as_its_folder(
    native: Path, hub_cache: Callable[[str, Path], None]
) -> None:
    """Same digest, same vectors, and the network is not asked, whether it may be or not."""
    hub_cache(REPOSITORY, native)
    cached, local = OpenClip(model=f"hf-hub:{REPOSITORY}"), OpenClip(model=f"local-dir:{native}")
    assert cached.digest(offline=True) == cached.digest(offline=False) == local.digest(offline=True)
    vectors = [model.load(device="cpu", offline=False).embed_texts(TEXTS) for model in (cached, local)]
    assert np.array_equal(*vectors)


def test_what_a_cached_repository_refers_to_is_taken_from_the_cache(
    referring: Path, text_repository: Path, tmp_path: Path, hub_cache: Callable[[str, Path], None]
) -> None:
    """Its text tower and its tokenizer; the same model as a folder that holds them itself."""
    hub_cache(REPOSITORY, referring)
    hub_cache(TEXT_REPOSITORY, text_repository)
    folder = copied(referring, tmp_path)
    shutil.copytree(text_repository, folder / TEXT_REPOSITORY)
    cached, local = OpenClip(model=f"hf-hub:{REPOSITORY}"), OpenClip(model=f"local-dir:{folder}")
    assert cached.digest(offline=True) == local.digest(offline=True)
    assert np.array_equal(cached.load(device="cpu", offline=True).embed_texts(TEXTS), loaded(folder).embed_texts(TEXTS))


@pytest.mark.parametrize("activation", ["quick", "exact"])
def test_weights_by_tag_bring_their_preprocessing_and_activation(
    activation: str,
    native: Path,
    tmp_path: Path,
    hub_cache: Callable[[str, Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The config of the name knows neither, and open_clip would use another activation with a warning."""
    from open_clip import factory, pretrained

    tag = PREPROCESSING | {"hf_hub": f"{REPOSITORY}/", "quick_gelu": activation == "quick"}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", NATIVE)  # noqa: SLF001 - its real names have large weights
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {activation: tag})  # noqa: SLF001
    hub_cache(REPOSITORY, native)
    folder, pixels = copied(native, tmp_path), tiles(2)
    changed(folder, model_cfg=NATIVE | {"quick_gelu": activation == "quick"})
    ours = OpenClip(model="tiny", pretrained=activation).load(device="cpu", offline=True)
    of_tiles, of_texts = of_open_clip(folder, pixels, TEXTS)
    assert ours.embed_tiles(ours.prepare(pixels)) == pytest.approx(of_tiles, abs=1e-6)
    assert ours.embed_texts(TEXTS) == pytest.approx(of_texts, abs=1e-6)


def test_a_model_keeps_its_digest_at_another_place(
    native: Path, tmp_path: Path, hub_cache: Callable[[str, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is named: its weights may have been carried to a machine without a network."""
    from open_clip import factory, pretrained

    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", NATIVE)  # noqa: SLF001 - its real names have large weights
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"tag": {"hf_hub": f"{REPOSITORY}/"}})  # noqa: SLF001
    hub_cache(REPOSITORY, native)
    folder = copied(native, tmp_path)
    for model in (
        OpenClip(model="tiny", pretrained="tag"),
        OpenClip(model=f"hf-hub:{REPOSITORY}"),
        OpenClip(model=f"local-dir:{native}"),
    ):
        expected = model.digest(offline=True)
        for place in (str(folder), f"local-dir:{folder}", f"hf-hub:{REPOSITORY}"):
            assert model.at(place).digest(offline=True) == expected
    moved = OpenClip(model="hf-hub:not/here").at(str(folder))
    assert np.array_equal(moved.load(device="cpu", offline=True).embed_texts(TEXTS), loaded(native).embed_texts(TEXTS))


def test_all_weights_of_open_clip_lie_on_the_hub() -> None:
    """So that nothing else needs to be fetched from anywhere."""
    import open_clip

    sources = [open_clip.get_pretrained_cfg(*pair) for pair in open_clip.list_pretrained()]
    assert all(source["hf_hub"].count("/") == 2 for source in sources)


def test_the_digest_is_of_contents(native: Path, tmp_path: Path) -> None:
    """Not of the place, nor of files that decide nothing; of each that does."""
    folder = copied(native, tmp_path)
    digests = [OpenClip(model=f"local-dir:{path}").digest(offline=True) for path in (native, folder)]
    (folder / "README.md").write_text("other words")
    digests.append(OpenClip(model=f"local-dir:{folder}").digest(offline=True))
    assert len(set(digests)) == 1
    assert len(digests[0]) == 64
    changed(folder, preprocess_cfg=PREPROCESSING | {"mean": [0.5, 0.5, 0.5]})
    digests.append(OpenClip(model=f"local-dir:{folder}").digest(offline=True))
    weights = load_file(folder / WEIGHTS)
    weights["logit_scale"] += 1
    save_file(weights, folder / WEIGHTS)
    digests.append(OpenClip(model=f"local-dir:{folder}").digest(offline=True))
    assert len(set(digests)) == 3


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json"])
def test_the_digest_is_of_what_a_model_refers_to(
    file: str, referring: Path, text_repository: Path, tmp_path: Path
) -> None:
    """The tokenizer and the text tower's config."""
    folder = copied(referring, tmp_path)
    shutil.copytree(text_repository, folder / TEXT_REPOSITORY)
    model = OpenClip(model=f"local-dir:{folder}")
    before = model.digest(offline=True)
    with (folder / TEXT_REPOSITORY / file).open("a") as stream:
        stream.write("\n")
    assert model.digest(offline=True) != before


def test_the_digest_does_not_read_the_weights_as_weights(native: Path, tmp_path: Path) -> None:
    """Bytes are enough."""
    folder = copied(native, tmp_path)
    (folder / WEIGHTS).write_bytes(b"no tensors")
    assert OpenClip(model=f"local-dir:{folder}").digest(offline=True)


@pytest.mark.parametrize("model", [f"hf-hub:{REPOSITORY}", "ViT-B-32", "ViT-B/32", REPOSITORY])
@pytest.mark.usefixtures("hub_cache")
def test_offline_what_is_not_here_is_refused_at_once(model: str) -> None:
    """The network is not asked; the message names the repository and the local alternative."""
    options = OpenClip(model=model, pretrained="laion2b_s34b_b79k" if "ViT" in model else "")
    name = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K" if "ViT" in model else REPOSITORY
    own = (
        "weights = '" if "ViT" in model else "model = 'transformers:" if model == REPOSITORY else "model = 'local-dir:"
    )
    with pytest.raises(ModelError, match=rf"{name}: .*--offline.*{own}/path/to/folder'"):
        options.digest(offline=True)
    with pytest.raises(ModelError, match="--offline"):
        options.load(device="cpu", offline=True)


@pytest.mark.usefixtures("hub_cache")
def test_offline_a_text_tower_that_is_not_here_is_refused_by_name(referring: Path) -> None:
    """The message says where in a folder of one's own it may lie."""
    with pytest.raises(ModelError, match=rf"{TEXT_REPOSITORY}: .*--offline.*{referring / TEXT_REPOSITORY}"):
        loaded(referring)


@pytest.mark.usefixtures("hub_cache")
def test_a_repository_that_cannot_be_fetched_is_refused_with_all_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name, its licence, the command to log in and the local alternative."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", refuse)
    remedies = f"{REPOSITORY}: .*no route.*https://huggingface.co/{REPOSITORY}.*hf auth login.*'local-dir:"
    with pytest.raises(ModelError, match=remedies):
        OpenClip(model=f"hf-hub:{REPOSITORY}").digest(offline=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "ViT-B-23", "pretrained": "openai"}, "no model 'ViT-B-23' .*ViT-B-32"),
        ({"model": "QuiltNet"}, "no model 'QuiltNet'.*hf-hub:owner/name"),
        ({"model": ""}, "no model ''"),
        ({"model": "ViT-B-32"}, "pretrained = one of: openai, .*laion2b_s34b_b79k"),
        ({"model": "ViT-B-32", "pretrained": "laion2b_s34b_b78k"}, "did you mean 'laion2b_s34b_b79k'"),
        ({"model": "hub:a/b"}, "'hub:a/b' cannot be understood.*'hf-hub:owner/name'"),
        ({"model": "local-dir:"}, "cannot be understood"),
        ({"model": "local-dir:/nowhere"}, "/nowhere: is no folder of a model of open_clip.*open_clip_config.json"),
        ({"model": "hf-hub:a/b", "pretrained": "openai"}, "Leave pretrained out"),
        ({"model": "hf-hub:a b"}, "neither a path that exists nor a repository"),
    ],
)
@pytest.mark.usefixtures("hub_cache")
def test_a_model_that_cannot_be_meant_is_refused(options: dict[str, str], message: str) -> None:
    """The message says what can."""
    with pytest.raises(ModelError, match=message):
        OpenClip(**options).digest(offline=True)


def test_a_folder_without_saying_whose_is_refused(native: Path) -> None:
    """The message gives both ways to write it."""
    with pytest.raises(ModelError, match=f"'local-dir:{native}'.*'transformers:{native}'"):
        OpenClip(model=str(native)).digest(offline=True)


def test_an_unknown_device_is_refused_before_anything_is_read() -> None:
    """The folder does not even exist."""
    with pytest.raises(OptionsError, match="device 'tpu'"):
        OpenClip(model="local-dir:/nowhere").load(device="tpu", offline=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "holds no table"),
        ("{}", "no image-text model"),
        (json.dumps({"model_cfg": {"vision_cfg": {}}}), "no image-text model"),
        (json.dumps({"model_cfg": NATIVE | {"colour": 1}}), "cannot build the model.*colour"),
        (json.dumps({"model_cfg": NATIVE | {"text_cfg": {"letters": 1}}}), "cannot build the model.*letters"),
        (json.dumps({"model_cfg": NATIVE, "preprocess_cfg": {"resize_mode": "guess"}}), "cannot use the preprocessing"),
        (
            json.dumps({"model_cfg": NATIVE | {"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}}),
            "yet another repository",
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(content: str, message: str, native: Path, tmp_path: Path) -> None:
    """The message names the file or the folder, and what is wrong with it."""
    folder = copied(native, tmp_path)
    (folder / CONFIG).write_text(content)
    with pytest.raises(ModelError, match=f"{folder}.*{message}"):
        loaded(folder)


def test_a_folder_without_weights_is_refused(native: Path, tmp_path: Path) -> None:
    """The message says what such a file is called."""
    folder = copied(native, tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=f"has no weights. Copy {WEIGHTS}"):
        loaded(folder)


def test_weights_of_any_name_are_taken_if_there_are_no_others(native: Path, tmp_path: Path) -> None:
    """Two of them are not chosen from."""
    folder = copied(native, tmp_path)
    (folder / WEIGHTS).rename(folder / "mine.safetensors")
    expected = loaded(native).embed_texts(TEXTS)
    assert np.array_equal(loaded(folder).embed_texts(TEXTS), expected)
    (folder / "older.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"which weights\? There are mine.safetensors, older.bin"):
        loaded(folder)


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_damaged_weights_are_refused(size: int, native: Path, tmp_path: Path) -> None:
    """Wherever the file was cut off."""
    folder = copied(native, tmp_path)
    (folder / WEIGHTS).write_bytes((native / WEIGHTS).read_bytes()[:size])
    with pytest.raises(ModelError, match=f"{folder / WEIGHTS}: is damaged"):
        loaded(folder)


def test_a_pickle_that_carries_code_is_refused_and_not_run(native: Path, tmp_path: Path) -> None:
    """The message says what it is and how to convert what one trusts."""

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = copied(native, tmp_path)
    (folder / WEIGHTS).unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"logit_scale": Code()}))
    with pytest.raises(ModelError, match="carries"):
        loaded(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_architecture_are_refused_by_name(native: Path, tmp_path: Path) -> None:
    """The message names tensors that are missing, unexpected, and of another shape."""
    folder = copied(native, tmp_path)
    weights = load_file(native / WEIGHTS)
    weights["text_projection"] = weights["text_projection"][:, :8].contiguous()
    weights["nonsense"] = weights.pop("ln_final.bias")
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"another architecture.*ln_final.bias.*nonsense.*text_projection.*32, 8"):
        loaded(folder)


def test_a_damaged_tokenizer_is_refused(referring: Path, text_repository: Path, tmp_path: Path) -> None:
    """The message names the folder."""
    folder = copied(referring, tmp_path)
    shutil.copytree(text_repository, folder / TEXT_REPOSITORY)
    (folder / TEXT_REPOSITORY / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=f"{folder}: open_clip cannot read the tokenizer"):
        loaded(folder)


def test_code_that_comes_with_a_text_tower_is_refused(referring: Path, text_repository: Path, tmp_path: Path) -> None:
    """Without a question at the terminal."""
    folder = copied(referring, tmp_path)
    shutil.copytree(text_repository, folder / TEXT_REPOSITORY)
    config = {"model_type": "theirs", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / TEXT_REPOSITORY / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"cannot build the model.*trust_remote_code"):
        loaded(folder)
