"""How much memory there is, from files as kernels write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridkv.memory import available_memory

GIB = 2**30
UP = ".."
MEMINFO = (
    "MemTotal:       24683652 kB\nMemFree:        19654572 kB\nMemAvailable:   16777216 kB\nSwapFree: 99999999 kB\n"
)
V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
)


def system(root: Path, files: dict[str, str]) -> Path:
    """A root directory with these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(path: str, limit: object, usage: int, stat: str = "") -> dict[str, str]:
    """The files of one group of version 2."""
    place = f"sys/fs/cgroup/{path}".rstrip("/")
    return {
        f"{place}/memory.max": f"{limit}\n",
        f"{place}/memory.current": f"{usage}\n",
        f"{place}/memory.stat": stat,
    }


def test_the_machine_alone(tmp_path: Path) -> None:
    found = available_memory(system(tmp_path, {"proc/meminfo": MEMINFO}))
    assert found is not None
    assert (found.n_bytes, found.source) == (16 * GIB, "free on this machine")


def test_nothing_says(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert available_memory(system(tmp_path, {"proc/meminfo": "MemAvailable: lots\n\n"})) is None


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"": "max", "a": "max", "a/b": "max"}, 16),
        ({"": "max", "a": 8 * GIB, "a/b": "max"}, 7),  # a group above this one
        ({"": "max", "a": 8 * GIB, "a/b": 4 * GIB}, 3),
        ({"": "max", "a": 2 * GIB, "a/b": 4 * GIB}, 1),
        ({"": "max", "a": "max", "a/b": 64 * GIB}, 16),  # more than the machine has
        ({"": 5 * GIB, "a": "max"}, 4),  # a container sees its own group as the root, which has files then
    ],
)
def test_groups_of_version_2(tmp_path: Path, limits: dict[str, object], expected: int) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": V2}
    for path, limit in limits.items():
        files |= group(path, limit, GIB)
    found = available_memory(system(tmp_path, files))
    assert found is not None
    assert found.n_bytes == expected * GIB
    assert ("container" in found.source) == (expected < 16)


def test_cached_files_are_free(tmp_path: Path) -> None:
    """A model that was mapped before is counted as used by its group."""
    stat = f"anon {GIB}\nfile {5 * GIB}\ninactive_file {3 * GIB}\nactive_file {2 * GIB}\nshmem 0\n"
    files = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2, **group("", 8 * GIB, 6 * GIB, stat)}
    found = available_memory(system(tmp_path, files))
    assert found is not None
    assert found.n_bytes == 7 * GIB


def test_more_used_than_the_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2, **group("", GIB, 2 * GIB)}
    found = available_memory(system(tmp_path, files))
    assert found is not None
    assert found.n_bytes == 0


@pytest.mark.parametrize(
    ("own", "shown"),
    [("/docker/abc", "/"), ("/docker/abc", "/docker/abc"), (f"/{UP}/elsewhere", "/"), ("/x", "/other")],
)
def test_groups_of_version_1(tmp_path: Path, own: str, shown: str) -> None:
    """Seen from the host, from a container that sees its own group alone, and from beside the mount."""
    mounts = V1.replace("0:32 / ", f"0:32 {shown} ")
    files = {"proc/meminfo": MEMINFO, "proc/self/mountinfo": mounts}
    files["proc/self/cgroup"] = f"4:memory:{own}\n1:cpu,cpuacct:/other\n0::/\n"
    at = "sys/fs/cgroup/memory" + (own if (own, shown) == ("/docker/abc", "/") else "")
    files |= {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "123\n",
        f"{at}/memory.limit_in_bytes": f"{4 * GIB}\n",
        f"{at}/memory.usage_in_bytes": f"{2 * GIB}\n",
        f"{at}/memory.stat": f"total_inactive_file {GIB}\ninactive_file 5\n",
    }
    found = available_memory(system(tmp_path, files))
    assert found is not None
    assert (found.n_bytes, found.source) == (3 * GIB, "free in this container of 4.00 GiB")


def test_no_limit_of_version_1(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/mountinfo": V1, "proc/self/cgroup": "4:memory:/\n"}
    files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712\n"
    files["sys/fs/cgroup/memory/memory.usage_in_bytes"] = "1000\n"
    found = available_memory(system(tmp_path, files))
    assert found is not None
    assert found.n_bytes == 16 * GIB


def test_lines_that_no_kernel_writes(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/mountinfo": "x\n - \n\n1 2 - cgroup2\n", "proc/self/cgroup": "0\n:\n"}
    assert available_memory(system(tmp_path, files)) is not None


def test_this_machine() -> None:
    found = available_memory()
    assert found is not None
    assert 2**20 < found.n_bytes < 2**50
