"""Read GeoJSON of any container one feature after the other. Knows files and JSON; judges no feature."""

import codecs
import gzip
import re
import string
import zipfile
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

import ijson

from wsi_anomaly.errors import AnnotationError

SUFFIXES = (".json", ".geojson", ".json.gz", ".geojson.gz", ".zip")

_FEATURES = frozenset({"features"})
_CHILDREN = frozenset({"childObjects", "children"})
_OPENING = frozenset({"start_map", "start_array"})
_CLOSING = frozenset({"end_map", "end_array"})
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|(?P<open>\\?\Z))|(?P<literal>-?(?:NaN|Infinity))', re.DOTALL)
_LETTERS = b"-" + string.ascii_letters.encode()
_DAMAGE = (
    ijson.JSONError,
    EOFError,
    OSError,
    zlib.error,
    zipfile.BadZipFile,
    UnicodeDecodeError,
    RecursionError,
    NotImplementedError,
)

_Events = Iterator[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Element:
    """One feature, geometry or other value of the file."""

    where: str
    """Such as `features[3]`; inside it `.childObjects[5]`; empty for a file that is one element."""
    value: Any
    """As parsed, but without the features it contains: these are elements of their own, and come before it."""


def read_elements(path: Path) -> Iterator[Element]:
    """The elements of a FeatureCollection, an array, a Feature or a geometry, with one of them in memory at a time.

    Raises:
        AnnotationError: the file is missing, of an unknown kind, damaged or no JSON.
    """
    if not path.name.lower().endswith(SUFFIXES):
        raise AnnotationError(f"{path}: QuPath reads {', '.join(SUFFIXES)}. Rename the file if it holds GeoJSON.")
    try:
        for where, stream in _streams(path):
            events = ijson.basic_parse(_LenientNumbers(stream), use_float=True)
            event, value = next(events)
            yield from _value(events, event, value, where)
            deque(events, maxlen=0)  # What follows the value is an error.
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise AnnotationError(f"{path}: is damaged or no JSON ({reason}). Export it again.") from error


def _streams(path: Path) -> Iterator[tuple[str, BufferedIOBase]]:
    """Each JSON text in the file, with the name of the entry where there are several."""
    if path.suffix.lower() != ".zip":
        with _opened(path) as stream:
            yield "", stream
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.lower().endswith((".json", ".geojson")):
                with archive.open(name) as stream:
                    yield f"{name}: ", cast("BufferedIOBase", stream)


@contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    with path.open("rb") as raw:
        if path.suffix.lower() == ".gz":
            with gzip.open(raw) as unpacked:
                yield unpacked
        else:
            yield raw


def _value(events: _Events, event: str, value: object, where: str) -> Iterator[Element]:
    if event == "start_map":
        yield from _map(events, where)
    elif event == "start_array":
        yield from _array(events, where)
    else:
        yield Element(where, value)


def _array(events: _Events, where: str) -> Iterator[Element]:
    for index, (event, value) in enumerate(iter(lambda: next(events), ("end_array", None))):
        yield from _value(events, event, value, f"{where}[{index}]")


def _map(events: _Events, where: str) -> Iterator[Element]:
    built = yield from _members(events, where, _FEATURES)
    yield Element(where, built)


def _members(events: _Events, where: str, streamed: frozenset[str]) -> Generator[Element, None, dict[str, Any]]:
    """What an object holds, but for the arrays named in `streamed`, whose elements are given out one by one."""
    built: dict[str, Any] = {}
    for _, key in iter(lambda: next(events), ("end_map", None)):
        event, value = next(events)
        if key in streamed and event == "start_array":
            built[key] = []
            yield from _array(events, f"{where}{'.' if where.endswith(']') else ''}{key}")
        elif key == "properties" and event == "start_map" and streamed is _FEATURES:
            built[key] = yield from _members(events, where, _CHILDREN)
        else:
            built[key] = _built(events, event, value)
    return built


def _built(events: _Events, event: str, value: object) -> Any:  # noqa: ANN401 - whatever JSON holds
    if event not in _OPENING:
        return value
    builder = ijson.ObjectBuilder()
    builder.event(event, value)
    depth = 1
    while depth:
        event, value = next(events)
        depth += (event in _OPENING) - (event in _CLOSING)
        builder.event(event, value)
    return builder.value


class _LenientNumbers:
    """A binary stream in which the number literals NaN and Infinity, which QuPath reads and JSON lacks, became text."""

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream = stream
        self._held = b""
        self._begun = False

    def read(self, size: int) -> bytes:
        """At least one byte, unless the stream has ended."""
        while True:
            chunk = self._stream.read(size)
            if chunk and not self._begun:
                chunk = chunk.removeprefix(codecs.BOM_UTF8)
                self._begun = True
            data = self._held + chunk
            whole = _whole_tokens(data) if chunk else len(data)
            self._held = data[whole:]
            if whole or not chunk:
                return _with_text_for_literals(data[:whole])


def _whole_tokens(data: bytes) -> int:
    """How many bytes there are before a text or word that may go on in the next chunk. Data begin outside any text."""
    if b"\\" not in data:
        end = data.rfind(b'"') if data.count(b'"') % 2 else len(data)
    else:
        end = next((match.start() for match in _TOKEN.finditer(data) if match["open"] is not None), len(data))
    return len(data[:end].rstrip(_LETTERS))


def _with_text_for_literals(data: bytes) -> bytes:
    if b"NaN" not in data and b"Infinity" not in data:
        return data
    return _TOKEN.sub(lambda match: b'"%s"' % match[0] if match["literal"] else match[0], data)
