"""The file of a command's measurements: one by name, or the next of a name that nothing has yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybridkv.cli.show import notice
from hybridkv.errors import UsageError

_MOST = 1000


def output_path(asked: str | None, default: str, others: Sequence[str], *, resume: bool) -> Path:
    """Choose the file to write.

    Parameters
    ----------
    asked
        `-o`; None for the default, or where it is taken the first of `NAME-2`, `NAME-3`, ... that is free.
    others
        Suffixes of what is written beside it; the first is of the journal that `--resume` goes on with.
    resume
        Whether to go on with what is there; without `asked`, the last of them.

    Raises
    ------
    UsageError
        For another suffix, a directory that is not there, a file that is, and nothing to go on with.
    """
    output = Path(default) if asked is None else Path(asked)
    if output.suffix != Path(default).suffix:
        raise UsageError(f"-o {asked!r}; allowed: a file name that ends in {Path(default).suffix}")
    if not output.parent.is_dir():
        raise UsageError(f"-o {asked}: there is no directory {output.parent}")
    if asked is None:
        output = _last(output, others[0]) if resume else _free(output, others)
    journal = output.with_suffix(others[0])
    if resume:
        if not journal.exists():
            raise UsageError(f"--resume: there is no {journal}", hint="leave --resume out to begin")
        return output
    if held := _held(output, others):
        raise UsageError(f"-o {output}: {held[0]} exists", hint="--resume goes on with it; or choose another -o")
    return output


def _held(output: Path, others: Sequence[str]) -> list[Path]:
    return [path for path in (output, *map(output.with_suffix, others)) if path.exists()]


def _numbered(output: Path) -> list[Path]:
    return [output, *(output.with_stem(f"{output.stem}-{number}") for number in range(2, _MOST))]


def _free(output: Path, others: Sequence[str]) -> Path:
    """Find the first file of the name that does not exist yet."""
    found = next((path for path in _numbered(output) if not _held(path, others)), output)
    if found != output:
        notice(f"{output.name} is there from before; this run writes {found.name}")
    return found


def _last(output: Path, journal: str) -> Path:
    """Find the last file of the name that can be resumed."""
    begun = [path for path in _numbered(output) if path.with_suffix(journal).exists()]
    return begun[-1] if begun else output
