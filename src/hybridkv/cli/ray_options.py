"""The meaning of `--ray` to every command that has it: a Ray of its own on this machine, or a cluster's."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec

from hybridkv.errors import UsageError

LOCAL = "local"
"""Where `--ray` goes if it is given no address."""

_SECONDS = 5.0


def check_ray() -> None:
    """Refuse to run without Ray.

    Raises
    ------
    UsageError
        Saying how to install it.
    """
    if find_spec("ray") is None:
        raise UsageError("--ray needs a package that is not installed: ray", hint='pip install "hybridkv[ray]"')


def connect(address: str, *, n_at_once: int, n_cpus: int, n_gpus: int, what: str) -> None:
    """Start Ray, or find the one that runs.

    Parameters
    ----------
    n_at_once, n_cpus, n_gpus
        How many processes have to run at once, and what each of them needs.
    what
        What they are called.

    Raises
    ------
    UsageError
        If there is none, or it has not what they need.
    """
    import ray

    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of what is done here is reported
        cpus = max(n_at_once * n_cpus, os.cpu_count() or 1)
        ray.init(address=LOCAL, num_cpus=cpus, include_dashboard=False, logging_level="warning")
    else:
        try:
            _knock(address)
            ray.init(address=address, logging_level="warning")
        except (OSError, ValueError) as error:
            raise UsageError(f"--ray {address}: no Ray is found there", hint="`ray start --head` starts one") from error
    there = ray.cluster_resources()
    for kind, each in (("CPU", n_cpus), ("GPU", n_gpus)):
        if there.get(kind, 0) < n_at_once * each:
            raise UsageError(
                f"{n_at_once} {what} of {each} {kind}s at once, and Ray has {there.get(kind, 0):g}",
                hint="take fewer, or fewer threads (-t)",
            )


def _knock(address: str) -> None:
    """Find out in seconds that nobody is there: Ray itself tries for minutes.

    Raises
    ------
    OSError
        If nobody is.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
