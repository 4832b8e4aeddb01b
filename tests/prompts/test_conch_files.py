"""Facts about the files of CONCH: where they are found, what the digest is of, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.prompts.conch import Conch, ConchEmbedder
from wsi_anomaly.prompts.conch_network import ConchSizes
from wsi_anomaly.prompts.conch_random import write_random_conch

SMALL = ConchSizes(
    embedding=8,
    image_px=16,
    patch_px=8,
    image_width=8,
    image_layers=1,
    image_heads=2,
    text_width=8,
    text_layers=1,
    text_heads=2,
    vocabulary=300,
    context=20,
)
LEFT_OVER = {
    name: torch.ones(2) for name in ("text_decoder.a", "visual.attn_pool_caption.query", "visual.ln_caption.b")
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    folder = tmp_path_factory.mktemp("conch")
    write_random_conch(folder, SMALL, texts=["tumour cells", "tumour stroma"])
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be spoilt."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def load(weights: Path | str, **options: Any) -> ConchEmbedder:
    """As a run without a network does."""
    return Conch(weights=str(weights), **options).load(device="cpu", offline=True)


def digest(weights: Path, **options: Any) -> str:
    """As a run without a network does."""
    return Conch(weights=str(weights), **options).digest(offline=True)


def vectors(embedder: ConchEmbedder) -> np.ndarray:
    """Of a few tiles and texts."""
    tiles = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    return np.concatenate([embedder.embed_tiles(tiles), embedder.embed_texts(["tumour", "stroma"])])


def change_sizes(folder: Path, **sizes: Any) -> None:
    """In the file beside the weights."""
    table = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(table | sizes), encoding="utf-8")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "mine.safetensors", "mine.bin"])
@pytest.mark.parametrize("by_folder", [True, False])
def test_weights_are_found_in_a_folder_and_by_name(name: str, *, by_folder: bool, written: Path, folder: Path) -> None:
    """As safetensors or as the pickle that the authors give, with the parts of it that are not used."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save({"state_dict": {f"module.{key}": one for key, one in (weights | LEFT_OVER).items()}}, folder / name)
    else:
        save_file(weights | LEFT_OVER, folder / name)
    assert np.array_equal(vectors(load(folder if by_folder else folder / name)), vectors(load(written)))


def test_safetensors_are_preferred(written: Path, folder: Path) -> None:
    """A pickle beside them is not even opened."""
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "other.safetensors").write_bytes(b"")
    assert digest(folder) == digest(written)


def test_weights_of_the_hub_are_used_where_they_lie(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy on this machine, offline."""
    repository = tmp_path / "models--someone--small"
    shutil.copytree(written, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert np.array_equal(vectors(load("hf_hub:someone/small")), vectors(load(written)))
    with pytest.raises(ModelError, match=r"^someone/large: is not on this machine, and --offline"):
        load("hf_hub:someone/large")


def test_weights_in_half_precision_are_computed_with_in_full(written: Path, folder: Path) -> None:
    """A file of float16 is a smaller file, and nothing more."""
    halves = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors")
    embedder = load(folder)
    assert {weights.dtype for weights in embedder.network.parameters()} == {torch.float32}
    assert vectors(embedder) == pytest.approx(vectors(load(written)), abs=5e-3)


def test_a_random_model_is_the_same_each_time(written: Path, folder: Path, tmp_path: Path) -> None:
    """Equal arguments, equal bytes; another seed, other weights."""
    write_random_conch(tmp_path / "again", SMALL, texts=["tumour cells", "tumour stroma"])
    assert digest(tmp_path / "again") == digest(written)
    write_random_conch(folder, SMALL, seed=1, texts=["tumour cells", "tumour stroma"])
    assert digest(folder) != digest(written)


def test_the_tokenizer_of_a_random_model_learns_its_texts(written: Path) -> None:
    """A word that it saw often is one token; others are still read, byte by byte."""
    encode = load(written).tokenizer.encode
    assert len(encode("tumour").ids) - encode("tumour").ids.count(0) < len("<tumour>")
    assert 0 not in encode("qzxvj 漢字 qzxvj qzxvj").ids


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    """The message says how many there must be."""
    sizes = SMALL.model_copy(update={"vocabulary": 258})
    with pytest.raises(OptionsError, match="258 is too small: bytes and special tokens alone are 259"):
        write_random_conch(tmp_path, sizes, texts=[])


def test_the_digest_is_of_what_decides_an_embedding(written: Path, folder: Path) -> None:
    """Not of the place, nor of how the tokenizer is found."""
    first = digest(written)
    (folder / "tokenizer.json").rename(folder / "conch_byte_level_bpe_uncased.json")
    assert len(first) == 64
    assert digest(folder) == digest(folder / "model.safetensors") == first
    elsewhere = (folder / "conch_byte_level_bpe_uncased.json").rename(folder.parent / "words.json")
    assert digest(folder, tokenizer=str(elsewhere)) == first


def test_a_model_can_lie_at_another_place(written: Path, folder: Path) -> None:
    """With the tokenizer that was named, unless it stayed behind."""
    words = (folder / "tokenizer.json").rename(folder.parent / "words.json")
    here = Conch(weights="/elsewhere/conch", tokenizer=str(words)).at(str(folder))
    assert here.digest(offline=True) == digest(written)
    there = Conch(weights="/elsewhere/conch", tokenizer="/elsewhere/words.json").at(str(written))
    assert there.digest(offline=True) == digest(written)


@pytest.mark.parametrize("changed", ["model.safetensors", "tokenizer.json"])
def test_the_digest_changes_with_each_file(changed: str, written: Path, folder: Path) -> None:
    """By one byte."""
    with (folder / changed).open("ab") as file:
        file.write(b" ")
    assert digest(folder) != digest(written)


def test_the_digest_changes_with_the_sizes_and_not_with_how_they_are_written(written: Path, folder: Path) -> None:
    """The heads of a network are nowhere in its weights."""
    change_sizes(folder)
    assert digest(folder) == digest(written)
    change_sizes(folder, image_heads=4)
    assert digest(folder) != digest(written)


def test_without_a_file_of_sizes_they_are_those_of_conch_v1(folder: Path) -> None:
    """So the small weights do not fit; the message names shapes and the file to write."""
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"267 missing .* \[8\], not \[768\].*put a config\.json .*\"image_px\":448"):
        load(folder)


def test_weights_for_another_image_size_are_refused(folder: Path) -> None:
    """Positions are not interpolated: that would be another model."""
    change_sizes(folder, image_px=32)
    with pytest.raises(ModelError, match=r"pos_embed is \[1, 5, 8\], not \[1, 17, 8\]"):
        load(folder)


def test_weights_of_another_architecture_are_refused(folder: Path) -> None:
    """A file of another model, say; the message counts what differs."""
    save_file({"conv1.weight": torch.ones(2), "fc.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"49 missing \(logit_scale, .*\); 2 unexpected \(conv1\.weight, fc\.weight\)"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no table of sizes"),
        ('{"embed_dim": 512}', "unknown key 'embed_dim'"),
        ('{"image_width": 30, "image_heads": 4}', "'image_heads' = 4: .*does not divide image_width = 30"),
        ('{"context": 3}', "'context' = 3"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(content: str, fault: str, folder: Path) -> None:
    """The message names the file, the fault, and says when no such file is needed."""
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=rf"config\.json: .*{fault}.* take it away .*Its keys: embedding, image_px"):
        load(folder)


@pytest.mark.parametrize("action", [load, digest])
def test_a_missing_tokenizer_is_asked_for(action: Any, folder: Path) -> None:
    """The message says which file it is and where it belongs, also before anything is loaded."""
    (folder / "tokenizer.json").unlink()
    expected = r"copy/tokenizer\.json or .*: the tokenizer is missing.*tokenizers/conch_byte_level_bpe_uncased\.json"
    with pytest.raises(ModelError, match=expected):
        action(folder)
    with pytest.raises(ModelError, match=r"^/nowhere/words\.json: the tokenizer is missing"):
        action(folder, tokenizer="/nowhere/words.json")


def test_a_tokenizer_that_does_not_belong_to_the_weights_is_refused(folder: Path) -> None:
    """Damaged, with other special tokens, or with more tokens than the network knows."""
    path = folder / "tokenizer.json"
    content = path.read_text(encoding="utf-8")
    path.write_text(content[:100], encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer\.json: is damaged, or no tokenizer .*belongs to the weights"):
        load(folder)
    path.write_text(content.replace("<pad>", "<other>"), encoding="utf-8")
    with pytest.raises(ModelError, match="'<pad>' is token None, not 0"):
        load(folder)
    path.write_text(content, encoding="utf-8")
    change_sizes(folder, vocabulary=200)
    with pytest.raises(ModelError, match=r"knows \d+ tokens, the weights 200"):
        load(folder)


def test_missing_weights_are_asked_for(folder: Path, tmp_path: Path) -> None:
    """A folder may hold none, or several among which no name decides."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(ModelError, match=r"several weights \(a\.safetensors, b\.safetensors\)\. Name the file itself"):
        load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: there are no weights"):
        load(tmp_path / "empty")
    for name in ("a/b", "hf-hub:a/b"):
        with pytest.raises(ModelError, match=rf"{name}: there are no weights here\. .*write 'hf_hub:a/b'"):
            load(name)


def test_a_device_that_is_not_known_is_refused_first(tmp_path: Path) -> None:
    """Before files are looked for."""
    with pytest.raises(OptionsError, match="device 'tpu' is not known"):
        Conch(weights=str(tmp_path)).load(device="tpu", offline=True)
