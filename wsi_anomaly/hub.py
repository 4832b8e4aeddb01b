"""Weights from the Hugging Face hub: the copy on this machine first, the network only where there is none.

The one module that may ask the network for anything, and never does with `offline`.
"""

import fnmatch
import logging
from collections.abc import Sequence
from pathlib import Path

from wsi_anomaly.errors import ModelError

log = logging.getLogger(__name__)


def hub_folder(
    repository: str, *, weights: Sequence[str], beside: Sequence[str] = (), licence: str = "its licence", offline: bool
) -> Path:
    """The folder with a repository's files on this machine, downloaded if they are not there yet.

    `weights` are names or patterns in order of preference: the first that the repository has is fetched, with all files
    that match `beside`.

    Raises:
        ModelError: the repository is gated, has no such files or cannot be reached; says what to do instead.
    """
    return hub_parts(repository, [weights], beside=beside, licence=licence, offline=offline)


def hub_parts(
    repository: str,
    parts: Sequence[Sequence[str]],
    *,
    beside: Sequence[str] = (),
    licence: str = "its licence",
    offline: bool,
) -> Path:
    """The same for a repository of several parts, each a choice of names or patterns in order of preference.

    A copy on this machine counts if it has a file of every part.

    Raises:
        ModelError: the repository is gated, lacks a part or cannot be reached; says what to do instead.
    """
    if cached := _cached(repository, parts):
        return cached
    if offline:
        raise ModelError(
            f"{repository}: is not on this machine, and --offline forbids to fetch it. Run once without --offline "
            f"(accept {licence} on the repository's page of the Hugging Face hub; gated weights need 'hf auth login'), "
            "or copy the repository's files into a folder and give that folder's path."
        )
    log.info("fetching %s from the Hugging Face hub", repository)
    try:
        return _download(repository, parts, beside)
    except Exception as error:
        raise _explained(error, repository, licence) from error


def _cached(repository: str, parts: Sequence[Sequence[str]]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ModelError(
            f"'{repository}' is neither a path that exists nor a repository of the hub. Correct the path, or give a "
            "repository as OWNER/NAME."
        ) from error
    return folder if all(any(next(folder.glob(name), None) for name in choice) for choice in parts) else None


def _download(repository: str, parts: Sequence[Sequence[str]], beside: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    names = HfApi().list_repo_files(repository)
    chosen = [next((name for name in choice if fnmatch.filter(names, name)), None) for choice in parts]
    if lacking := [choice for choice, name in zip(parts, chosen, strict=True) if name is None]:
        raise FileNotFoundError(f"it has none of {', '.join(lacking[0])}")
    return Path(snapshot_download(repository, allow_patterns=[*filter(None, chosen), *beside]))


def _explained(error: Exception, repository: str, licence: str) -> ModelError:
    """The same error for a user: what to accept, how to log in, what to do without a network."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    local = "Or fetch its files on another machine and give their folder as a path."
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{repository}: its weights are gated. Accept {licence} on the repository's page of the Hugging Face hub, "
            f"log in with 'hf auth login', and run again. {local}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            f"{repository}: the Hugging Face hub has no such repository, or shows it only after login. Check the name; "
            f"accept {licence} on its page; log in with 'hf auth login'. {local}"
        )
    return ModelError(
        f"{repository}: cannot be fetched from the Hugging Face hub ({type(error).__name__}: {error}). Licence: "
        f"{licence}; gated weights need 'hf auth login'. {local} With --offline the network is not tried."
    )
