"""What is to be kept beside the scores, held against what a scorer can give. Scores nothing."""

from wsi_anomaly.detectors.protocol import Localizer, Reconstructor, Scorer
from wsi_anomaly.errors import OptionsError


def require_abilities(scorer: Scorer, name: str, *, maps: str, reconstructions: str) -> None:
    """Make sure that a detector of this name gives what the options `keep_maps` and `keep_reconstructions` ask for.

    Raises:
        OptionsError: it does not.
    """
    wishes = (("maps", maps, Localizer), ("reconstructions", reconstructions, Reconstructor))
    for what, wish, ability in wishes:
        if wish != "none" and not isinstance(scorer, ability):
            raise OptionsError(
                f"the detector '{name}' makes no {what}, which are to be kept ({wish}). Give --keep-{what} none, or "
                f'write keep_{what} = "none" under [score] of the pipeline file.'
            )
