"""A model on disk: the folder that travels. Its manifest holds the sha256 of every file; damage is never used."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from wsi_anomaly import __version__
from wsi_anomaly.errors import ModelError, WsiAnomalyError
from wsi_anomaly.storage.layout import ModelFolder
from wsi_anomaly.storage.record import write_json
from wsi_anomaly.storage.reference import Reference, read_reference

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Model:
    """A model that has been checked against its manifest."""

    folder: ModelFolder
    pipeline: Mapping[str, Any]
    """The pipeline file as a table, every default written out."""
    reference: Reference
    image_text_digest: str | None
    """Of the image-text model that it was fitted with, where it uses prompts."""
    detector_digest: str
    """Of the weights and of the detector's options: of all that decides a score."""
    digest: str
    """Of the whole model."""


def write_manifest(folder: Path, *, recipe_digest: str, image_text_model: Mapping[str, str] | None = None) -> None:
    """Seal a model folder: the sha256 of every file in it, and what it was made of.

    `image_text_model`: name and digest of what described the tiles, where anything did.
    """
    files = {
        str(path.relative_to(folder).as_posix()): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    content = {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "recipe_digest": recipe_digest,
        "image_text_model": image_text_model,
        "files": files,
    }
    write_json(folder / ModelFolder(folder).manifest.name, content)


def read_manifest(folder: ModelFolder) -> dict[str, Any]:
    """The manifest of a model.

    Raises:
        ModelError: there is no model, its manifest is damaged or from a newer version.
    """
    root = folder.root
    if not root.is_dir():
        raise ModelError(f"{root}: there is no such model folder. Make one: wsi-anomaly fit NORMAL_SLIDES -o {root}")
    try:
        manifest = json.loads(folder.manifest.read_text(encoding="utf-8"))
        version, files = manifest["format_version"], dict(manifest["files"])
    except FileNotFoundError as error:
        raise ModelError(
            f"{root}: is no model, it has no manifest.json. Make one: wsi-anomaly fit NORMAL_SLIDES -o {root}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder.manifest}: is damaged ({error}). Copy the model again or fit it anew.") from error
    if version > FORMAT_VERSION:
        raise ModelError(
            f"{root}: was made by a newer version (format {version}, this one reads {FORMAT_VERSION}). "
            "Upgrade: pip install --upgrade wsi-anomaly"
        )
    return manifest | {"files": files}


def read_model(root: Path) -> Model:
    """A model, checked file by file.

    Raises:
        ModelError: a file is missing or not the one that was fitted; the message names it.
    """
    folder = ModelFolder(root)
    manifest = read_manifest(folder)
    files: dict[str, str] = manifest["files"]
    for name, expected in files.items():
        _check(root / name, expected)
    try:
        pipeline = tomllib.loads(folder.pipeline.read_text(encoding="utf-8"))
        reference = read_reference(folder.reference)
    except (OSError, ValueError, WsiAnomalyError) as error:
        raise ModelError(f"{root}: cannot be used: {error}. Fit it anew.") from error
    weights = {name: digest for name, digest in files.items() if name.startswith(f"{folder.detector.name}/")}
    scoring = {"detector": pipeline.get("detector"), "weights": weights}
    return Model(
        folder,
        pipeline,
        reference,
        image_text_digest=(manifest.get("image_text_model") or {}).get("digest"),
        detector_digest=_digest(scoring),
        digest=_digest(files),
    )


def write_toml(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table as TOML; keys without a value (None) are left out, as TOML has no null."""
    path.write_text(tomli_w.dumps(without_none(table)), encoding="utf-8")


def without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table that TOML can hold."""
    return {
        key: without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }


def _check(path: Path, expected: str) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise ModelError(f"{path}: is missing from the model. Copy the model again or fit it anew.") from error
    if found != expected:
        raise ModelError(f"{path}: is damaged (its sha256 is not that of the manifest). Copy the model again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Any) -> str:  # noqa: ANN401 - any JSON
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
