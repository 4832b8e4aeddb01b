"""Keyword lists: TOML files to checked lists of phrases. Knows no tile, no image-text model and no network."""

import os
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from wsi_anomaly.errors import KeywordError
from wsi_anomaly.options import Options, nearest

Category = Literal["cell", "architecture", "vessel", "stroma", "sinus", "cytology"]
"""What a keyword is about: a kind of cell, how cells and parts are arranged, vessels, what holds it all together
(fibers, fat, muscle, nerves), lymphatic sinuses, or how nuclei and cytoplasm look."""

Place = tuple[str | int, ...]
"""Where a fault lies within a file, as pydantic tells it: ("normal", 3, "text")."""
Fault = tuple[Place, str]


class Keyword(Options):
    """A phrase for something seen in a tile. It may hold any character, but no blank at either end."""

    text: str = Field(pattern=r"^\S(?:.*\S)?$")
    category: Category


class KeywordList(Options):
    """The vocabulary of one organ, in the order that decides ties."""

    organ: str = Field(min_length=1)
    source: str = Field(min_length=1)
    """Where the phrases come from, and under which licence."""
    note: str = Field(min_length=1)
    """How the list was made, and what its user should know."""
    normal: tuple[Keyword, ...] = Field(min_length=1)
    abnormal: tuple[Keyword, ...] = ()

    def chosen(self, *, include_abnormal: bool) -> tuple[Keyword, ...]:
        """The normal keywords, and the abnormal ones behind them where they are asked for."""
        return self.normal + (self.abnormal if include_abnormal else ())

    def texts(self, *, include_abnormal: bool) -> tuple[str, ...]:
        """The phrases of the chosen keywords."""
        return tuple(keyword.text for keyword in self.chosen(include_abnormal=include_abnormal))


def load_keywords(name_or_path: str | Path) -> KeywordList:
    """A list that comes with the package by bare name ("lymph_node"), or a keyword file by path.

    Raises:
        KeywordError: there is no such list or file, or it is not TOML, lacks something, has an unknown key or category,
            or a keyword is blank, padded or there twice (letter case and width of blanks make no difference). Names
            every fault with its line.
    """
    path = _keywords_path(name_or_path)
    source = _text(path)
    try:
        table = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise KeywordError(
            f"{path.name}: is not valid TOML: {error}. Mend it there; strings stand in quotes."
        ) from error
    marked = tomllib.loads(_marked(source))
    faults = list(_repetitions(table, marked))
    try:
        keywords = KeywordList.model_validate(table)
    except ValidationError as error:
        faults += _schema_faults(error)
    if faults:
        raise KeywordError(_message(path.name, marked, faults))
    return keywords


def is_path(name_or_path: str | Path) -> bool:
    """Whether this is the path of a keyword file (it ends in .toml or has a separator), not the name of a list."""
    text = str(name_or_path)
    return text.endswith(".toml") or "/" in text or os.sep in text


def keyword_list_names() -> tuple[str, ...]:
    """The lists that come with the package."""
    return tuple(_shipped())


def load_templates() -> tuple[str, ...]:
    """Sentences with `{}` where a keyword goes: its text vector is the mean over them (AnoPILaD, released code)."""
    table = tomllib.loads((_folder() / "templates.toml").read_text(encoding="utf-8"))
    return tuple(table["templates"])


def _keywords_path(name_or_path: str | Path) -> Path:
    if is_path(name_or_path):
        return Path(name_or_path)
    shipped = _shipped()
    if str(name_or_path) not in shipped:
        raise KeywordError(
            f"there is no keyword list '{name_or_path}' ({nearest(str(name_or_path), list(shipped))}). "
            "Give the name of a list that comes with the package, or the path of a .toml file."
        )
    return shipped[str(name_or_path)]


@cache
def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(_folder().glob("*.toml")) if path.stem != "templates"}


def _folder() -> Path:
    return Path(str(files("wsi_anomaly") / "keywords"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first, TOML allows none
    except FileNotFoundError as error:
        raise KeywordError(
            f"{path}: there is no such keyword file. Correct the path, or give the name of a list that comes with the "
            f"package: {', '.join(_shipped())}."
        ) from error
    except UnicodeDecodeError as error:
        raise KeywordError(f"{path}: is not UTF-8 text. Save it as UTF-8.") from error
    except OSError as error:
        raise KeywordError(f"{path}: cannot be read ({error.strerror}). Give the path of a .toml file.") from error


def _repetitions(table: dict[str, Any], marked: dict[str, Any]) -> Iterator[Fault]:
    """Keywords that stand there a second time, in the same list or on the other side."""
    first: dict[str, Place] = {}
    for place, text in _keyword_texts(table):
        before = first.setdefault(" ".join(text.split()).casefold(), place)
        if before is place:
            continue
        where = _where(marked, before)
        if before[0] == place[0]:
            yield place, f"'{text}' stands there twice (first in {where}). Remove one."
        else:
            yield place, f"'{text}' is in both lists, {place[0]} and {before[0]} ({where}). Keep it on one side."


def _keyword_texts(table: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    """The keywords of both lists, as far as they have the right form and are not blank."""
    for side in ("normal", "abnormal"):
        entries = table.get(side)
        for i, entry in enumerate(entries if isinstance(entries, list) else ()):
            text = entry.get("text") if isinstance(entry, dict) else None
            if isinstance(text, str) and text.strip():
                yield (side, i), text


def _schema_faults(error: ValidationError) -> Iterator[Fault]:
    for fault in error.errors(include_url=False):
        if fault["type"] == "too_short" and fault["input"]:
            continue  # a list is not empty because each of its entries has a fault of its own
        yield fault["loc"], _schema_fault(dict(fault))


def _schema_fault(fault: dict[str, Any]) -> str:
    """What pydantic found, in our words."""
    place, value = fault["loc"], fault["input"]
    name = place[-1]
    known = (Keyword if len(place) > 1 else KeywordList).model_fields
    match fault["type"]:
        case "extra_forbidden":
            text = f"unknown key '{name}' ({nearest(name, list(known))}). Correct or remove it."
        case "missing":
            text = f"'{name}' is missing. Add it."
        case "literal_error":
            text = f"category {value!r} is not known ({nearest(str(value), get_args(Category))})."
        case "string_pattern_mismatch" if value.strip():
            text = f"{value!r} begins or ends with a blank, or holds a line break. Remove it."
        case "string_pattern_mismatch":
            text = "a keyword is empty. Write its text or remove the entry."
        case "too_short" | "string_too_short":
            text = f"'{name}' is empty. Fill it."
        case "model_type":
            text = f'{value!r} is no entry. Write it as {{text = "...", category = "..."}}.'
        case _:
            text = f"'{name}' = {value!r}: {fault['msg'].lower()}."
    return text


_TOKEN = re.compile(
    r'''
      \#[^\n]*                                     # a comment
    | (?: """(?:\\.|[^\\])*?"{3,5} | \'{3}.*?\'{3,5} # a string of several lines
        | "(?:\\.|[^"\\])*" | '[^']*' )            # or of one
      (?P<key>[ \t]*[=.])?                         # that is a key
    ''',
    re.VERBOSE | re.DOTALL,
)


def _marked(source: str) -> str:
    """The same TOML with its line number in front of each string value: `tomllib` does not tell where a value stood."""

    def mark(token: re.Match[str]) -> str:
        text = token[0]
        if text.startswith("#") or token["key"]:
            return text
        quote = text[:3] if text[:3] in {'"""', "'''"} else text[0]
        line = source.count("\n", 0, token.start()) + 1
        return f"{quote}{line}:{text.removeprefix(quote)}"

    return _TOKEN.sub(mark, source)


def _line(marked: dict[str, Any], place: Place) -> int | None:
    """The line of the first string at this place, else in the entry around it."""
    return next(chain(_lines_at(marked, place), _lines_at(marked, place[:2])), None)


def _lines_at(marked: dict[str, Any], place: Place) -> Iterator[int]:
    found: Any = marked
    try:
        for part in place:
            found = found[part]
    except (LookupError, TypeError):
        return
    yield from _lines(found)


def _lines(value: Any) -> Iterator[int]:  # noqa: ANN401 - whatever TOML can hold
    if isinstance(value, str):
        yield int(value.partition(":")[0])
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _lines(part)


def _where(marked: dict[str, Any], place: Place) -> str:
    if (line := _line(marked, place)) is not None:
        return f"line {line}"
    return f"entry {int(place[1]) + 1} of '{place[0]}'" if len(place) > 1 else ""


def _message(name: str, marked: dict[str, Any], faults: list[Fault]) -> str:
    """All faults in the order of their lines, one a line."""
    ordered = sorted(faults, key=lambda fault: _line(marked, fault[0]) or 0)
    return "\n".join(f"{', '.join(filter(None, (name, _where(marked, place))))}: {text}" for place, text in ordered)
