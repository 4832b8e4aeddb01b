"""What the groups of ASAP and the classes of QuPath mean: abnormal, excluded or ignored. Knows no polygon."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from wsi_anomaly.errors import AnnotationError

Meaning = Literal["abnormal", "excluded", "ignored"]
"""`excluded` is cut out of what is abnormal; `ignored` says nothing either way."""

_NAMES: Mapping[Meaning, Sequence[str]] = {
    "abnormal": (
        "",
        *("tumor", "tumour", "_0", "_1"),  # Camelyon16
        *("metastases", "metastasis"),  # Camelyon17
        "ln_malignant",  # the lymph nodes of AnoPILaD
        *("abnormal", "anomaly", "cancer", "carcinoma", "lesion", "malignant", "necrosis"),
    ),
    "excluded": ("exclusion", "_2", "normal", "ignore*"),  # Camelyon16, Camelyon17, QuPath
    "ignored": ("region*", "tissue"),  # QuPath
}
GROUPS: Mapping[str, Meaning] = {name: meaning for meaning, names in _NAMES.items() for name in names}
"""The groups that are understood without being told, in lower case; "" are the areas without any."""

OTHERS = "*"
"""The name that stands for every group that is not named itself."""


def parse_groups(texts: Iterable[str]) -> dict[str, Meaning]:
    """The meanings that `NAME=abnormal`, `NAME=excluded` and `NAME=ignored` state, for `read_annotation`.

    The name `none` are the areas without a group, `*` every group that is not named otherwise.

    Raises:
        AnnotationError: a text is not of this form.
    """
    meanings: dict[str, Meaning] = {}
    for text in texts:
        name, _, wanted = text.rpartition("=")
        meaning = next((known for known in get_args(Meaning) if known == wanted.strip().lower()), None)
        if meaning is None or not name.strip():
            raise AnnotationError(f"group '{text}': write NAME={', NAME='.join(get_args(Meaning))}")
        meanings[_key(name)] = meaning
    return meanings


def meaning_of(names: Sequence[str], groups: Mapping[str, Meaning]) -> Meaning | None:
    """What a group of these names (itself, then what it is part of) means; None where nothing says so.

    `groups` goes before `GROUPS`, its "*" after them.
    """
    known = {**GROUPS, **{_key(name): meaning for name, meaning in groups.items()}}
    return next((known[_key(name)] for name in names or [""] if _key(name) in known), known.get(OTHERS))


def _key(name: str) -> str:
    key = name.strip().casefold()
    return "" if key == "none" else key
