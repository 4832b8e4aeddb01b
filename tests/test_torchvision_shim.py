"""Each in a process of its own: what is imported, and what is declared, cannot be taken back."""

import subprocess
import sys


def printed_by(script: str) -> str:
    """What a script prints; one that fails is a failure."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_all_that_looks_for_torchvision_can_be_imported_after_a_plugin() -> None:
    """Whether or not the installed torchvision fits the installed PyTorch."""
    script = """
from wsi_anomaly.plugins import DETECTORS, load_plugin
load_plugin(DETECTORS, "autoencoder")
import open_clip, timm, torchvision
from diffusers import StableDiffusionImg2ImgPipeline
from transformers import CLIPModel
try:
    import compel, peft
except ModuleNotFoundError as error:
    assert error.name in {"compel", "peft"}
print(open_clip.list_models()[0])
"""
    assert printed_by(script) == "coca_base"


def test_a_second_call_changes_nothing() -> None:
    """Before and after torchvision is imported."""
    script = """
from wsi_anomaly.torchvision_shim import make_importable
make_importable(); make_importable()
import torchvision
make_importable()
print(torchvision.transforms.CenterCrop(2).size)
"""
    assert printed_by(script) == "(2, 2)"


def test_operators_that_are_there_are_left_as_they_are() -> None:
    """As on a machine where torchvision can load its own."""
    script = """
import torch
library = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.impl("nms", lambda dets, scores, iou_threshold: scores + 1, "CPU")
from wsi_anomaly.torchvision_shim import make_importable
make_importable()
print(torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5).item())
"""
    assert printed_by(script) == "1.0"


def test_nothing_happens_where_torchvision_is_not_installed() -> None:
    """Not even an import of torch."""
    script = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else find_spec(name, *rest)
from wsi_anomaly.torchvision_shim import make_importable
make_importable()
print("torch" in sys.modules)
"""
    assert printed_by(script) == "False"


def test_listing_plugins_does_not_import_torch() -> None:
    """Commands without a network answer at once."""
    script = """
import sys
from wsi_anomaly.plugins import DETECTORS, installed
installed(DETECTORS)
print("torch" in sys.modules)
"""
    assert printed_by(script) == "False"
