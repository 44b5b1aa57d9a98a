"""Models in several files, `NAME-00001-of-00003.gguf` and so on: one header for all of them.

Owns finding the parts, joining their headers, and saying what is wrong with parts that were cut or joined as bytes.
Does not own reading one file (`reader.py`). Called by `load.py`.

The first part has the metadata; the others say which part they are and list their tensors.
Source: gguf-py constants.py (`Keys.Split`) and gguf_writer.py (shard names).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from gguf import GGUF_DEFAULT_ALIGNMENT

from hybridkv.errors import ModelFileError
from hybridkv.gguf.kinds import check_kind
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.reader import MAGIC, Header, read_header

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NO, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_PIECE = re.compile(r"(?P<whole>.+\.gguf)(\.part\d+of(?P<count>\d+)|[.-](split-|part-?)?([a-z]{1,2}|\d{1,3}))")
_HINT = "all parts belong in one directory, under the names they were written with"


def read_model(path: str | Path) -> Header:
    """Read a model's header; of a split model, all parts', whichever of them `path` names.

    Raises
    ------
    ModelFileError
        As `read_header`; for a part that is missing or belongs to another model; for a file that is no language model.
    """
    header = _read(Path(path))
    count = _number(header, _COUNT, 1)
    if count <= 1:
        check_kind(header)
        return header
    name = _PART.fullmatch(header.path.name)
    if name is None or int(name["count"]) != count:
        _fail(header, f"it is one of {count} parts, and not named like one (NAME-00001-of-{count:05}.gguf)")
    parts = [_part(header, f"{name['stem']}-{number:05}-of-{count:05}.gguf", number) for number in range(1, count + 1)]
    tensors = tuple(replace(info, part=number) for number, part in enumerate(parts) for info in part.tensors)
    names = [info.name for info in tensors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        _fail(header, f"tensor {twice!r} is in two parts")
    expected = _number(parts[0], _TENSORS, len(tensors))
    if expected != len(tensors):
        _fail(header, f"its {count} parts have {len(tensors)} tensors together; {_TENSORS!r} says {expected}")
    whole = replace(parts[0], tensors=tensors, parts=tuple(parts))
    check_kind(whole)
    return whole


def metadata_of(path: str | Path | Header) -> Metadata:
    """Return a model's metadata, from its header if that is at hand; see `read_model`."""
    return Metadata(path if isinstance(path, Header) else read_model(path))


def _read(path: Path) -> Header:
    """Read one file's header; of a file that was cut or joined as bytes, say so."""
    try:
        header = read_header(path)
    except ModelFileError as error:
        piece = _PIECE.fullmatch(path.name)
        if piece is None or not path.is_file():
            raise
        raise ModelFileError(
            f"{path} is one part of a split file: {error.message}", hint=_how_to_join(piece)
        ) from error
    if _is_joined(header):
        raise ModelFileError(
            f"{path}: a second GGUF file begins behind this one's tensors; allowed: one model in a file",
            hint="files of a split model are not joined with cat: keep them side by side under their own names, or "
            "join them with llama.cpp's llama-gguf-split --merge",
        )
    return header


def _how_to_join(piece: re.Match[str]) -> str:
    whole, count = piece["whole"], int(piece["count"] or 0)
    if not 1 <= count <= 9:
        return f"join all pieces in their order with cat, and give the whole file: {whole}"
    names = " ".join(f"{whole}.part{number}of{piece['count']}" for number in range(1, count + 1))
    return f"join the pieces and give the whole file: cat {names} > {whole}"


def _is_joined(header: Header) -> bool:
    """Check whether GGUF begins again behind the last tensor, at its end or at the next multiple of the alignment."""
    end = max((info.offset + info.nbytes for info in header.tensors), default=header.file_bytes)
    if header.file_bytes - end < len(MAGIC):
        return False
    alignment = header.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    assert isinstance(alignment, int), "the header was checked"
    try:
        with header.path.open("rb") as file:
            for start in (end, -(-end // alignment) * alignment):
                file.seek(start)
                if file.read(len(MAGIC)) == MAGIC:
                    return True
    except OSError as error:
        raise ModelFileError(f"{header.path} cannot be read: {error.strerror}") from error
    return False


def _part(asked: Header, name: str, number: int) -> Header:
    path = asked.path.with_name(name)
    if path != asked.path and not path.is_file():
        _fail(asked, f"part {number} of {_number(asked, _COUNT, 1)} is missing: {path}")
    part = asked if path == asked.path else _read(path)
    count, own = _number(part, _COUNT, 1), _number(part, _NO, 0)
    if (count, own) != (_number(asked, _COUNT, 1), number - 1):
        _fail(part, f"it says that it is part {own + 1} of {count}, where part {number} of this model should be")
    if _number(part, _TENSORS, -1) != _number(asked, _TENSORS, -1):
        _fail(part, f"it is a part of another model than {asked.path.name}")
    return part


def _number(header: Header, key: str, default: int) -> int:
    if key not in header.metadata:
        return default
    value = header.metadata[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**16:
        _fail(header, f"{key!r} is {str(value)[:60]}; expected a whole number below {2**16}")
    return value


def _fail(header: Header, message: str) -> NoReturn:
    raise ModelFileError(f"{header.path}: {message}", hint=_HINT)
