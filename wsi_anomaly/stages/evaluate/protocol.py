"""Which choices an evaluation makes: the defaults, those of the AnoPILaD paper, and those of its released code."""

from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from wsi_anomaly.options import Options, parse_options

Negatives = Literal["all", "normal-slides"]
ProtocolName = Literal["default", "paper", "released"]


class Protocol(Options):
    """What counts as abnormal, what scores are taken from, and how sure the figures are."""

    name: ProtocolName = "default"
    """Of the protocol whose choices these are, but for those that the user made."""
    normal_up_to: float = Field(0.0, ge=0, lt=1)
    """Share of a tile inside the annotation up to which it is normal."""
    abnormal_from: float = Field(1.0, gt=0, le=1)
    """Share from which it is abnormal; 1 is fully inside. What lies between is left out of the tile level."""
    negatives: Negatives = "all"
    """Of the tile level: all normal tissue (the paper), or only that of normal slides (the released code)."""
    z_from: Literal["reference", "cohort"] = "reference"
    """Whether z is measured against the model's reference, or against all tiles of the slides under test."""
    slide_scores_of: Literal["z", "ranks"] = "z"
    """Z_MAX and Z_99 of z, or of the percentile ranks of all tiles of the cohort."""
    threshold_z: float = 0.0
    """Above which a cell is found, in the segmentation."""
    specificity_of: Literal["z", "ranks"] = "z"
    """The released code holds ranks, which are above 0 always, against the threshold; and so its TNR is near 0."""
    level: float = Field(0.95, gt=0.5, lt=1)
    """Of the intervals."""
    resamples: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0)

    @field_validator("abnormal_from")
    @classmethod
    def _above_normal(cls, abnormal_from: float, known: Any) -> float:  # noqa: ANN401 - beartype cannot check its class
        normal_up_to = known.data.get("normal_up_to", 0.0)
        if abnormal_from <= normal_up_to:
            raise PydanticCustomError(
                "contradiction", "must be larger than 'normal_up_to' = {normal_up_to}", {"normal_up_to": normal_up_to}
            )
        return abnormal_from

    def choices(self) -> tuple[str, ...]:
        """Each choice as a sentence for the notes of a table."""
        inside = "fully" if self.abnormal_from == 1 else f"to {self.abnormal_from:g} or more"
        tissue = "with" if self.negatives == "all" else "without"
        against = {"reference": "the model's reference", "cohort": "all tiles of the slides under test"}[self.z_from]
        limits = f"abnormal where {inside} inside the annotation, normal up to a share of {self.normal_up_to:g}"
        cells = f"eroded z above {self.threshold_z:g} against the tiles that the annotation touches"
        sampled = f"bootstrap over slides ({self.resamples} resamples, seed {self.seed})"
        return (
            f"Tiles: {limits}; others are left out.",
            f"Tiles: negatives {tissue} the normal tissue of abnormal slides.",
            f"z is measured against {against}.",
            f"Slides: Z_MAX and Z_99 of eroded {self.slide_scores_of}.",
            f"Segmentation: {cells}; TNR of normal slides by {self.specificity_of}.",
            "Lesions: joined as in Camelyon16, without isolated tumour cells; a detection is a peak of eroded z.",
            f"Intervals: {self.level:.0%}, DeLong for AUROC of slides, else {sampled}.",
        )


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "default": Protocol(),
    "paper": Protocol(name="paper", z_from="cohort"),
    "released": Protocol(name="released", negatives="normal-slides", slide_scores_of="ranks", specificity_of="ranks"),
}


def choose_protocol(
    name: ProtocolName = "default",
    *,
    abnormal_from: float | None = None,
    normal_up_to: float | None = None,
    negatives: Negatives | None = None,
    threshold_z: float | None = None,
) -> Protocol:
    """A protocol with some choices of the user's own; None leaves one as it is.

    Raises:
        OptionsError: a choice makes no sense, or two contradict each other.
    """
    own = {
        "abnormal_from": abnormal_from,
        "normal_up_to": normal_up_to,
        "negatives": negatives,
        "threshold_z": threshold_z,
    }
    changes = {key: value for key, value in own.items() if value is not None}
    return parse_options(Protocol, PROTOCOLS[name].model_dump() | changes, where=f"protocol '{name}'")
