import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from wsi_anomaly.errors import ModelError
from wsi_anomaly.hub import hub_folder, hub_parts

REPOSITORY = "laboratory/model"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, on a machine where touching the network is a failure."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def cached(hub: Path, *names: str) -> Path:
    """Files of the repository as an earlier download left them."""
    root = hub / f"models--{REPOSITORY.replace('/', '--')}"
    folder = root / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    for name in names:
        (folder / name).touch()
    return folder


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The hub answers with this error."""

    def answer(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", answer)


def refused(kind: type[RepositoryNotFoundError]) -> RepositoryNotFoundError:
    """An error as the hub library makes it."""
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error")
    return error


@pytest.mark.parametrize("offline", [True, False])
def test_a_copy_on_this_machine_is_used_without_asking_anyone(hub: Path, *, offline: bool) -> None:
    """So that weights never change behind a user's back."""
    folder = cached(hub, "model.safetensors")
    assert hub_folder(REPOSITORY, weights=("model.safetensors",), offline=offline) == folder


def test_offline_says_at_once_what_to_do() -> None:
    """No time-out, no name service."""
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"laboratory/model.*--offline.*copy the repository's files") as raised:
        hub_folder(REPOSITORY, weights=("model.safetensors",), offline=True)
    assert time.monotonic() - started < 5
    assert "Traceback" not in str(raised.value)


def test_a_copy_without_the_weights_does_not_count(hub: Path) -> None:
    """An interrupted download leaves small files only."""
    cached(hub, "config.json")
    with pytest.raises(ModelError, match="is not on this machine"):
        hub_folder(REPOSITORY, weights=("*.safetensors", "*.bin"), offline=True)


def test_gated_weights_name_licence_login_and_the_local_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a user needs."""
    failing(monkeypatch, refused(GatedRepoError))
    with pytest.raises(ModelError, match=r"laboratory/model.*Accept the licence X.*hf auth login.*folder as a path"):
        hub_folder(REPOSITORY, weights=("model.safetensors",), licence="the licence X", offline=False)


def test_an_unknown_repository_may_be_a_typing_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a gated one seen without login."""
    failing(monkeypatch, refused(RepositoryNotFoundError))
    with pytest.raises(ModelError, match=r"no such repository.*Check the name.*hf auth login"):
        hub_folder(REPOSITORY, weights=("model.safetensors",), offline=False)


def test_a_repository_without_weights_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is fetched."""
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_: ["README.md"])
    with pytest.raises(ModelError, match=r"none of \*\.safetensors, \*\.bin"):
        hub_folder(REPOSITORY, weights=("*.safetensors", "*.bin"), offline=False)


def test_only_the_preferred_weights_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Safetensors where there are both kinds."""
    asked: list[object] = []
    names = ["pytorch_model.bin", "model.safetensors", "config.json"]

    def fetch(_: str, *, allow_patterns: object = None, local_files_only: bool = False) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("none")
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    weights = ("model.safetensors", "pytorch_model.bin")
    assert hub_folder(REPOSITORY, weights=weights, beside=("*.json",), offline=False) == tmp_path
    assert asked == [["model.safetensors", "*.json"]]


def test_what_is_neither_a_path_nor_a_repository_is_said_to_be_so() -> None:
    """Such as a misspelt folder."""
    with pytest.raises(ModelError, match=r"neither a path that exists nor a repository.*OWNER/NAME"):
        hub_folder("/no/such/folder", weights=("*.bin",), offline=False)


def test_a_copy_counts_only_if_no_part_is_missing(hub: Path) -> None:
    """Of each part any choice will do."""
    folder = cached(hub, "a.bin", "b.safetensors")
    choices = [(f"{part}.safetensors", f"{part}.bin") for part in "ab"]
    assert hub_parts(REPOSITORY, choices, offline=True) == folder
    with pytest.raises(ModelError, match="is not on this machine"):
        hub_parts(REPOSITORY, [*choices, ("c.bin",)], offline=True)


def test_of_each_part_the_preferred_file_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A part that the repository lacks is said before anything is fetched."""
    asked: list[object] = []

    def fetch(_: str, *, allow_patterns: object = None, local_files_only: bool = False) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("none")
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_: ["a/x.bin", "b/x.bin", "b/x.safetensors"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    choices = [(f"{part}/x.safetensors", f"{part}/x.bin") for part in "ab"]
    assert hub_parts(REPOSITORY, choices, beside=("*.json",), offline=False) == tmp_path
    with pytest.raises(ModelError, match=r"none of c/x\.bin"):
        hub_parts(REPOSITORY, [*choices, ("c/x.bin",)], offline=False)
    assert asked == [["a/x.bin", "b/x.safetensors", "*.json"]]
