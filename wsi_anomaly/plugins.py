"""Plug-ins: from an entry-point name to its class. The only door through which detectors come in."""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from wsi_anomaly.errors import MissingExtraError, PluginError, UnknownPluginError
from wsi_anomaly.options import nearest
from wsi_anomaly.torchvision_shim import make_importable

DETECTORS = "wsi_anomaly.detectors"
IMAGE_TEXT_MODELS = "wsi_anomaly.image_text_models"


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name, sorted."""
    return {entry.name: entry for entry in sorted(entry_points(group=group), key=lambda entry: entry.name)}


def load_plugin(group: str, name: str) -> Any:  # noqa: ANN401 - the group decides what protocol the class fulfils
    """The class that an installed package registered under `name`.

    Raises:
        UnknownPluginError: nothing is registered under that name; the message lists what is.
        MissingExtraError: the plug-in needs a package that is not installed.
        PluginError: the plug-in's module exists but does not define the class.
    """
    kind = group.rsplit(".", 1)[-1].removesuffix("s").replace("_", " ")
    entry = installed(group).get(name)
    if entry is None:
        raise UnknownPluginError(f"no {kind} is named '{name}' ({nearest(name, installed(group))})")
    try:
        make_importable()
        return entry.load()
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the {kind} '{name}' needs the Python package '{error.name}', which is not installed. "
            f"Install it: pip install {error.name}"
        ) from error
    except AttributeError as error:
        raise PluginError(f"the {kind} '{name}' is registered as {entry.value}, which does not exist") from error
