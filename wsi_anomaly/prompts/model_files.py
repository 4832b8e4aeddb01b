"""Files of a public image-text model on this machine: fetch, read and digest them. Knows no architecture."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsi_anomaly.errors import ModelError
from wsi_anomaly.hub import hub_folder

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
"""A tokenizer of transformers has one of these."""
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
"""All that decides how a tokenizer of transformers cuts a text."""


def fetched(
    repository: str, *, needed: Sequence[Sequence[str]], beside: Sequence[str] = (), advice: str, offline: bool
) -> Path:
    """The folder with a repository's files on this machine; `advice` says how to give a folder of one's own instead.

    `needed` are names or patterns: of each group one file, the first that the repository has. The weights come last.

    Raises:
        ModelError: the repository is gated, has no such files, cannot be reached, or may not be asked for.
    """
    licence = f"the licence shown at https://huggingface.co/{repository}"
    try:
        # One by one: another program may have fetched some of them. The last folder has all, because what is fetched
        # comes with `beside`, and goes into the folder of the repository's newest state.
        return [
            hub_folder(repository, weights=group, beside=beside, licence=licence, offline=offline) for group in needed
        ][-1]
    except ModelError as error:
        raise ModelError(f"{error} {advice}") from error


def matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a folder that match, those of earlier patterns first, each once."""
    return list(dict.fromkeys(path for pattern in patterns for path in sorted(folder.glob(pattern))))


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table.

    Raises:
        ModelError: it is missing or damaged.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: is missing. Copy all files of the model into its folder.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: is damaged ({error}). Fetch the file again.") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path}: is damaged (it holds no table). Fetch the file again.")
    return table


def digest(contents: Mapping[str, Path | bytes]) -> str:
    """A sha256 of contents by name, in any order. Not of where a file lies."""
    whole = hashlib.sha256()
    for name, content in sorted(contents.items()):
        whole.update(f"{name}\0{_sha256(content)}\n".encode())
    return whole.hexdigest()


def _sha256(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
