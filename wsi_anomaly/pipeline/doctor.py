"""What is installed and what works, each finding with its remedy."""

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from wsi_anomaly import __version__
from wsi_anomaly.errors import WsiAnomalyError
from wsi_anomaly.plugins import DETECTORS, IMAGE_TEXT_MODELS, installed, load_plugin

_PACKAGES = (
    *("numpy", "scipy", "scikit-image", "zarr", "shapely", "tifffile", "imagecodecs", "tiffslide"),
    *("torchvision", "diffusers", "transformers", "peft", "compel", "open_clip_torch"),
    *("scikit-learn", "pyod", "zuko"),
)
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    well: bool
    found: str
    remedy: str = ""
    """Of what is well too, where something optional is missing."""


def examine() -> tuple[Finding, ...]:
    """Everything that a run depends on."""
    return (
        Finding("wsi-anomaly", well=True, found=f"{__version__}, Python {platform.python_version()}"),
        *map(_package, _PACKAGES),
        _attempt("OpenSlide", _openslide, "Install it: pip install openslide-python openslide-bin"),
        _attempt("PyTorch", _torch, "Install it: see 'Which PyTorch' in the README"),
        *_plugins("detector", DETECTORS),
        *_plugins("image-text model", IMAGE_TEXT_MODELS),
        Finding("free disk space", well=True, found=f"{shutil.disk_usage(Path.cwd()).free / _GIB:.0f} GiB here"),
        _attempt("writing here", _writing, "Go to a folder that you may write to, or give --out."),
    )


def _package(name: str) -> Finding:
    try:
        return Finding(name, well=True, found=version(name))
    except PackageNotFoundError:
        return Finding(name, well=False, found="not installed", remedy=f"Install it: pip install {name}")


def _attempt(what: str, look: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding(what, well=True, found=look())
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a library is what the user wants to know
        return Finding(what, well=False, found=f"{type(error).__name__}: {error}", remedy=remedy)


def _openslide() -> str:
    return f"library {import_module('openslide').__library_version__}, Python {version('openslide-python')}"


def _torch() -> str:
    torch = import_module("torch")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.__version__}, {', '.join(devices) if devices else 'no CUDA device: runs on the CPU'}"


def _plugins(kind: str, group: str) -> Iterator[Finding]:
    for name, entry in installed(group).items():
        try:
            plugin = load_plugin(group, name)
        except WsiAnomalyError as error:
            yield Finding(f"{kind} {name}", well=False, found="cannot be loaded", remedy=str(error))
        else:
            yield _extra(f"{kind} {name}", entry, getattr(plugin, "extra", ""))


def _extra(what: str, entry: EntryPoint, extra: str) -> Finding:
    """Of a plug-in that can be loaded: whether the optional package is there that it cannot work without."""
    if not extra:
        return Finding(what, well=True, found="can be loaded")
    if find_spec(extra) is not None:
        return Finding(what, well=True, found=f"can be loaded, and {extra} is installed")
    package = entry.dist.name if entry.dist else "wsi-anomaly"
    remedy = f"To use it, install its extra: pip install '{package}[{extra}]'"
    return Finding(what, well=True, found=f"can be loaded, but not used: {extra} is not installed", remedy=remedy)


def _writing() -> str:
    with tempfile.TemporaryFile(dir=Path.cwd()):
        return "possible"
