"""Options: frozen settings with defaults, where an unknown key or a wrong value is refused by name.

Every settings class of the project derives from `Options`; `parse_options` turns a table of a TOML file into one.
"""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from wsi_anomaly.errors import OptionsError


class Options(BaseModel):
    """Settings of one step: fields are options, defaults are in the class, nothing changes after construction."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


AnyOptions = TypeVar("AnyOptions", bound=Options)


def parse_options(options_class: type[AnyOptions], table: Mapping[str, Any], *, where: str) -> AnyOptions:
    """Options from a table of a TOML or JSON file.

    Raises:
        OptionsError: names every key at fault, what is wrong with it and, for an unknown key, the nearest known ones.
            `where` says which file and table the keys stand in.
    """
    try:
        return options_class.model_validate(dict(table))
    except ValidationError as error:
        faults = [_fault(options_class, dict(fault)) for fault in error.errors(include_url=False)]
        raise OptionsError(f"{where}: {'; '.join(faults)}") from error


def nearest(name: str, known: Mapping[str, Any] | list[str] | tuple[str, ...]) -> str:
    """A hint for a misspelt name: up to three known ones that are near, whatever the case of letters; else all."""
    spelt = {str(one).lower(): str(one) for one in known}
    if matches := [f"'{spelt[match]}'" for match in difflib.get_close_matches(name.lower(), spelt, n=3)]:
        *first, last = matches
        return f"did you mean {', '.join(first)}{' or ' if first else ''}{last}?"
    return f"known: {', '.join(sorted(known))}"


def _fault(options_class: type[Options], fault: dict[str, Any]) -> str:
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{name}' ({nearest(path[-1], _known_keys(options_class, path[:-1]))})"
    if fault["type"] == "missing":
        return f"key '{name}' is missing"
    return f"'{name}' = {fault['input']!r}: {_said(fault)}"


def _said(fault: Mapping[str, Any]) -> str:
    """What is wrong: in the words of our own checks as they are, in those of pydantic as part of a sentence."""
    text = str(fault["msg"])
    if fault["type"] == "value_error":
        return text.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _known_keys(options_class: type[Options], path: list[str]) -> list[str]:
    """The keys of the (possibly nested) options class that `path` leads to."""
    for part in path:
        field = options_class.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, Options):
            break
        options_class = field.annotation
    return list(options_class.model_fields)
