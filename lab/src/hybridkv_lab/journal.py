"""The numbers of a run on disk, so that an interrupted one continues and a later one adds candidates.

One `.npz` file beside the results: arrays per candidate, window and measure, and what the run was. Written whole and
put in place at once.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from hybridkv.errors import UsageError
from hybridkv_lab.measure import Trace, join
from hybridkv_lab.results import write_bytes

_RUN = "run"


class Journal:
    """Traces by candidate and window.

    Parameters
    ----------
    path
        Where `save` writes.
    run
        What must be equal for two runs to be comparable: model, tokens, context, mode, reference.
    """

    def __init__(self, path: Path, run: Mapping[str, str | int]) -> None:
        self.path = path
        self._run = json.dumps(dict(run), sort_keys=True)
        self._traces: dict[tuple[str, int], Trace] = {}

    def load(self) -> None:
        """Take up what an earlier run has left.

        Raises
        ------
        UsageError
            If it cannot be read, or is of another model, text or context.
        """
        try:
            # numpy leaves a file open that it cannot read.
            with self.path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                found = str(file[_RUN])
                arrays = {name: file[name] for name in file.files if name != _RUN}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UsageError(
                f"--resume: {self.path} cannot be read ({error})", hint="leave --resume out and choose another -o"
            ) from error
        if found != self._run:
            then, now = json.loads(found), json.loads(self._run)
            changed = ", ".join(f"{k} {then.get(k)!r} then, {now.get(k)!r} now" for k in now if then.get(k) != now[k])
            raise UsageError(
                f"--resume: {self.path} is of another run: {changed}", hint="leave --resume out and choose another -o"
            )
        names = [f.name for f in fields(Trace)]
        for key in dict.fromkeys(name.rpartition("|")[0] for name in arrays):
            label, _, window = key.rpartition("|")
            self._traces[label, int(window)] = Trace(*(arrays[f"{key}|{name}"] for name in names))

    def put(self, label: str, window: int, trace: Trace) -> None:
        """Keep a window's trace."""
        self._traces[label, window] = trace

    def holds(self, label: str, window: int, n_tokens: int) -> bool:
        """Check whether the whole window is there."""
        trace = self._traces.get((label, window))
        return trace is not None and trace.n == n_tokens

    def trace(self, label: str) -> Trace | None:
        """Join all windows of a candidate, in order; None if there is nothing."""
        found = [trace for (name, _), trace in sorted(self._traces.items()) if name == label]
        return join(found) if found else None

    def save(self) -> None:
        """Write everything."""
        arrays: dict[str, Any] = {_RUN: np.array(self._run)}
        arrays |= {
            f"{label}|{window}|{f.name}": getattr(trace, f.name)
            for (label, window), trace in self._traces.items()
            for f in fields(Trace)
        }
        archive = io.BytesIO()
        np.savez_compressed(archive, **arrays)
        write_bytes(self.path, archive.getvalue())
