"""Where the models lie that come with the package. Reads none of them."""

from importlib.resources import files
from pathlib import Path

from wsi_anomaly.errors import ModelError

SHIPPED = "shipped:"
"""Before the place of a part of such a model, in a pipeline file: "shipped:lymph-node-small/base"."""
DEFAULT_MODEL = "lymph-node-small"


def shipped_models() -> tuple[str, ...]:
    """Their names."""
    return tuple(sorted(path.parent.name for path in _models().glob("*/manifest.json")))


def model_place(given: Path | None) -> Path:
    """The folder of the model that a user means: a path, a name that ships, or nothing for `DEFAULT_MODEL`."""
    name = DEFAULT_MODEL if given is None else str(given)
    if given is not None and (given.exists() or name not in shipped_models()):
        return given
    return _models() / name


def local_place(place: str) -> Path:
    """The path that a place in a pipeline file stands for on this machine; places on the hub are none of this.

    Raises:
        ModelError: it is said to ship, and does not.
    """
    if not place.startswith(SHIPPED):
        return Path(place).expanduser()
    path = _models() / place.removeprefix(SHIPPED)
    if not path.exists():
        raise ModelError(
            f"'{place}': does not come with this version of wsi-anomaly. What does: "
            f"{', '.join(shipped_models()) or 'nothing'}. Install the package anew, or give another place."
        )
    return path


def _models() -> Path:
    return Path(str(files("wsi_anomaly") / "models"))
