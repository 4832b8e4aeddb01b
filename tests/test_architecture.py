import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "wsi_anomaly"
MODULES = sorted(PACKAGE.rglob("*.py"))

HOMES = {
    "openslide": ("slides",),
    "tiffslide": ("slides",),
    "zarr": ("storage",),
    "torch": ("detectors", "prompts", "devices", "checkpoints", "torchvision_shim", "testing"),
    "huggingface_hub": ("hub",),
    "typer": ("cli",),
    "rich": ("cli",),
    "ijson": ("reporting",),
    "psutil": ("storage",),
    "pytest": ("testing",),
    "pydicom": ("cohort",),
}
MAX_LINES = 300
MAX_FUNCTION_LINES = 60


def imported(module: Path) -> set[str]:
    """The top-level packages that a module imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def name_of(module: Path) -> str:
    """Its path within the package."""
    return module.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_dependency_has_one_home(library: str) -> None:
    """Whoever replaces it knows where to look."""
    homes = HOMES[library]
    strangers = [
        name_of(module)
        for module in MODULES
        if library in imported(module) and module.relative_to(PACKAGE).with_suffix("").parts[0] not in homes
    ]
    assert not strangers


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_no_file_and_no_function_is_long(module: Path) -> None:
    """At most 300 lines a file, 60 lines a function."""
    text = module.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES]
    assert not long


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_every_file_says_its_one_job(module: Path) -> None:
    """In its first line."""
    assert ast.get_docstring(ast.parse(module.read_text()))


def test_help_imports_nothing_heavy() -> None:
    """`wsi-anomaly --help` answers at once."""
    script = (
        "import sys; from wsi_anomaly.cli.app import app; "
        "heavy = {'torch', 'zarr', 'numpy', 'openslide', 'matplotlib', 'scipy', 'sklearn'} & set(sys.modules); "
        "print(*sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("\n", "")
