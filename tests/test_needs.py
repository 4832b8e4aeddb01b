"""A pipeline that cannot work is refused before any slide is opened."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from wsi_anomaly.cohort import read_cohort
from wsi_anomaly.errors import OptionsError
from wsi_anomaly.execution import Resources
from wsi_anomaly.options import parse_options
from wsi_anomaly.pipeline import fit
from wsi_anomaly.pipeline.preset import Pipeline


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        (
            {"name": "gnsm"},
            r"'gnsm' needs the prompts of tiles, and pipeline 'odd' .* Add a table \[prompt\]",
        ),
        ({"name": "embedding"}, "'embedding' needs the embeddings of tiles"),
        ({"name": "embedding", "method": "knnn"}, "did you mean"),
        ({"name": "anomalib", "model": "patchcor"}, "did you mean 'patchcore'"),
        pytest.param(
            {"name": "anomalib"},
            r"pip install 'wsi-anomaly\[anomalib\]'",
            marks=pytest.mark.skipif(find_spec("anomalib") is not None, reason="anomalib is installed here"),
        ),
    ],
)
def test_what_cannot_work_is_refused_before_slides_are_tiled(
    detector: dict[str, str], message: str, tmp_path: Path
) -> None:
    """Hours of tiling are not spent on it; the slide here is none, which nobody finds out."""
    (tmp_path / "node.tif").write_bytes(b"no slide")
    pipeline = parse_options(Pipeline, {"name": "odd", "detector": detector}, where="test")
    cohort = read_cohort([tmp_path / "node.tif"])
    with pytest.raises(OptionsError, match=message):
        fit(cohort, pipeline, tmp_path / "model", resources=Resources(device="cpu", workers=1), listener=lambda _: None)
    assert not (tmp_path / "model.fit").exists()
