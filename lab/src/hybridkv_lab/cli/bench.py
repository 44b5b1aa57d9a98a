"""`hybridkv bench`: how fast this machine runs it, beside the machine's ceilings and beside its peers."""

from __future__ import annotations

from hybridkv_lab.cli import bench_attention, bench_decode

NAME = "bench"
HELP = "time attention or a whole model, beside the machine's ceilings and other programs"
COMMANDS = (bench_attention, bench_decode)
