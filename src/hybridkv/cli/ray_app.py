"""The application for Ray's own tools: `serve run hybridkv.cli.ray_app:app options="-ctk q8_0 --replicas 4"`.

Or a config file with that `import_path` and `args: {options: ...}`. The options are those of the command line.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from hybridkv.cli.main import build_parser
from hybridkv.cli.serve import check
from hybridkv.cli.serve_ray import ray_application
from hybridkv.errors import UsageError


def app(args: Mapping[str, str]) -> Any:
    """Build what Ray's own tools deploy.

    Parameters
    ----------
    args
        `options`: words of `hybridkv serve`, as a shell would read them. Host and port are Ray's to say.

    Raises
    ------
    UsageError
        For what the command line would refuse.
    """
    if unknown := sorted(set(args) - {"options"}):
        raise UsageError(f"argument {unknown[0]!r}; allowed: options", hint='for example options="-ctk q8_0"')
    _, commands = build_parser(())
    words = shlex.split(args.get("options", ""))
    commands["serve"].check_options(words)
    a = commands["serve"].parse_args(words)
    a.ray = a.ray or "auto"
    return ray_application(a, *check(a))[0]
