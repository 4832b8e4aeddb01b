import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wsi_anomaly.errors import KeywordError, MissingOutputError, ModelError
from wsi_anomaly.execution import Resources
from wsi_anomaly.pipeline.prompting import build_prompter, prompt
from wsi_anomaly.prompts.keywords import load_templates
from wsi_anomaly.stages.prompt import Prompter, PromptOptions
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.prompts import TILES_PER_SHARD, PromptStore
from wsi_anomaly.storage.record import read_record

WriteTiles = Callable[..., SlideFolder]


def prompter(small_conch: Path, **options: object) -> Prompter:
    """Small CONCH, with the lymph node keywords unless told otherwise."""
    table = {"model": {"name": "conch", "weights": str(small_conch)}, "templates": False} | options
    return build_prompter(PromptOptions.model_validate(table), Resources(device="cpu", offline=True))


def described(folder: SlideFolder, by: Prompter, *, batch_size: int = 32) -> PromptStore:
    """The prompts of a slide."""
    prompt(folder, by, Resources(batch_size=batch_size))
    return PromptStore(folder.prompts)


def test_each_tile_gets_its_nearest_keywords(write_tiles: WriteTiles, small_conch: Path) -> None:
    """Recomputed from the stored embeddings: cosine, five highest, weight by their median, to two decimals."""
    model = prompter(small_conch)
    store = described(write_tiles(40), model)
    embedder, texts = model.load()
    embedding, similarity = store.embedding(slice(None)), store.similarity(slice(None))
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(embedding @ embedder.embed_texts(model.keywords).T, similarity, atol=1e-5)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(store.keyword, nearest)
    scores = np.take_along_axis(similarity, nearest, axis=1)
    np.testing.assert_allclose(store.weight, np.round(scores / scores[:, 2:3], 2), atol=0.0051)
    assert texts.vectors.shape == (74, 16)


def test_the_batch_size_changes_no_bit(write_tiles: WriteTiles, small_conch: Path) -> None:
    """Nor do unreadable tiles between the others."""
    first = described(write_tiles(21, slide_id="a"), prompter(small_conch), batch_size=32)
    second = described(write_tiles(21, slide_id="b", corrupt=(3, 20)), prompter(small_conch), batch_size=5)
    kept = np.delete(np.arange(21), [3, 20])
    np.testing.assert_array_equal(first.embedding(kept), second.embedding(kept))
    np.testing.assert_array_equal(first.similarity(kept), second.similarity(kept))
    np.testing.assert_array_equal(first.keyword[kept], second.keyword[kept])


def test_an_unreadable_tile_has_no_prompt(write_tiles: WriteTiles, small_conch: Path) -> None:
    """Its embedding is not a number; it is in no statistic."""
    store = described(write_tiles(6, corrupt=(2,)), prompter(small_conch))
    assert np.isnan(store.embedding(slice(2, 3))).all()
    assert (store.keyword[2] == -1).all()
    assert store.prompts(np.array([2])) == ((),)


def test_a_killed_stage_goes_on_after_its_last_shard(write_tiles: WriteTiles, small_conch: Path) -> None:
    """And ends with the same bytes."""
    tiles = TILES_PER_SHARD + 60
    killed, whole = write_tiles(tiles, slide_id="killed"), write_tiles(tiles, slide_id="whole")
    script = f"""
        import os, signal
        from pathlib import Path
        from wsi_anomaly.execution import Resources, listening
        from wsi_anomaly.pipeline.prompting import build_prompter, prompt
        from wsi_anomaly.stages.prompt import PromptOptions
        from wsi_anomaly.storage.layout import SlideFolder
        model = {{"name": "conch", "weights": {str(small_conch)!r}}}
        prompter = build_prompter(PromptOptions(model=model, templates=False), Resources(device="cpu"))
        def die(progress):
            if progress.tiles_done > {TILES_PER_SHARD}:
                os.kill(os.getpid(), signal.SIGKILL)
        with listening(die):
            prompt(SlideFolder(Path({str(killed.root)!r})), prompter, Resources(batch_size=32))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    partial = killed.root / "prompt.partial" / "prompts.zarr"
    shard = next(path for path in (partial / "embedding").rglob("0") if path.is_file())
    written = shard.stat().st_mtime_ns
    described(killed, prompter(small_conch))
    described(whole, prompter(small_conch))
    again = next(path for path in (killed.prompts / "embedding").rglob("0") if path.is_file())
    assert again.stat().st_mtime_ns == written
    for path in sorted(whole.prompts.rglob("*")):
        if path.is_file():
            assert (killed.prompts / path.relative_to(whole.prompts)).read_bytes() == path.read_bytes(), path


def test_prompts_are_redone_when_they_would_differ(write_tiles: WriteTiles, small_conch: Path, tmp_path: Path) -> None:
    """Weighting, keywords or model: stale. Its place on disk, batch size, device: not."""
    folder = write_tiles(6)
    described(folder, prompter(small_conch))
    first = read_record(folder.root, "prompt")
    (tmp_path / "moved").symlink_to(small_conch)
    described(folder, prompter(tmp_path / "moved"), batch_size=2)
    assert read_record(folder.root, "prompt") == first
    digests = {first.digest}
    for changed in ({"weighting": "quantised"}, {"top_k": 3}, {"include_abnormal": True}, {"keywords": "kidney"}):
        described(folder, prompter(small_conch, **changed))
        digests.add(read_record(folder.root, "prompt").digest)
    assert len(digests) == 5


def test_a_model_of_another_size_makes_stored_embeddings_stale(
    write_tiles: WriteTiles, small_conch: Path, tmp_path: Path
) -> None:
    """They are redone, not mixed."""
    from wsi_anomaly.prompts.conch_network import ConchSizes
    from wsi_anomaly.prompts.conch_random import write_random_conch

    folder = write_tiles(6)
    assert described(folder, prompter(small_conch)).embedding(slice(None)).shape == (6, 16)
    sizes = ConchSizes.model_validate_json((small_conch / "config.json").read_text())
    write_random_conch(tmp_path / "other", sizes.model_copy(update={"embedding": 24}), texts=["capsule"])
    assert described(folder, prompter(tmp_path / "other")).embedding(slice(None)).shape == (6, 24)


def test_text_vectors_are_computed_once(write_tiles: WriteTiles, small_conch: Path, user_cache: Path) -> None:
    """The second time they are read; damaged ones are computed again."""
    model = prompter(small_conch, templates=True)
    _, texts = model.load()
    (kept,) = user_cache.rglob("*.npz")
    written = kept.stat().st_mtime_ns
    _, again = prompter(small_conch, templates=True).load()
    assert kept.stat().st_mtime_ns == written
    np.testing.assert_array_equal(texts.vectors, again.vectors)
    kept.write_bytes(b"damaged")
    _, mended = prompter(small_conch, templates=True).load()
    np.testing.assert_array_equal(texts.vectors, mended.vectors)
    described(write_tiles(2), model)


def test_templates_are_averaged(small_conch: Path) -> None:
    """The mean of unit vectors, made a unit vector again."""
    model = prompter(small_conch, templates=True)
    embedder, texts = model.load()
    assert len(load_templates()) == 22
    phrases = [template.replace("{}", "capsule") for template in load_templates()]
    mean = embedder.embed_texts(phrases).mean(axis=0)
    found = texts.vectors[model.keywords.index("capsule")]
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)


def test_long_prompts_lose_their_last_keywords_and_say_how_many(
    write_tiles: WriteTiles, small_conch: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Never silently, and never past what the text encoder reads."""
    words = [
        "large cleaved follicular center cells with scant cytoplasm and inconspicuous nucleoli " + "x" * n
        for n in range(6)
    ]
    entries = "\n".join(f'  {{ text = "{word}", category = "cell" }},' for word in words).replace(' x"', ' y"')
    (tmp_path / "long.toml").write_text(
        f'organ = "x"\nsource = "x"\nnote = "x"\nnormal = [\n{entries.replace("nucleoli ", "nucleoli z")}\n]\n'
    )
    folder = write_tiles(4)
    store = described(folder, prompter(small_conch, keywords=str(tmp_path / "long.toml")))
    assert ((store.keyword >= 0).sum(axis=1) < 5).all()
    assert "prompts of 4 tiles were longer" in caplog.text
    assert read_record(folder.root, "prompt").facts["shortened"] == 4


def test_too_few_keywords_for_a_prompt_are_refused(small_conch: Path, tmp_path: Path) -> None:
    """With both numbers."""
    path = tmp_path / "few.toml"
    path.write_text('organ="x"\nsource="x"\nnote="x"\nnormal=[{text="one", category="cell"}]\n')
    with pytest.raises(KeywordError, match=r"it has 1 keywords, but top_k = 5"):
        prompter(small_conch, keywords=str(path))


def test_without_tiles_the_stage_names_the_command(small_conch: Path, tmp_path: Path) -> None:
    """Which comes first."""
    with pytest.raises(MissingOutputError, match="wsi-anomaly tile"):
        prompt(RunFolder(tmp_path / "nothing").slide("node"), prompter(small_conch), Resources())


def test_missing_weights_are_told_before_anything_is_done(tmp_path: Path) -> None:
    """Not after hours of tiling."""
    with pytest.raises(ModelError, match="nowhere"):
        prompter(tmp_path / "nowhere")
