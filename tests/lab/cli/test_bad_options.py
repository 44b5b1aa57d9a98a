"""Bad options of what measures: one clear error, before any model was looked at."""

from __future__ import annotations

import re

import pytest

from tests.cli.conftest import Cli
from tests.cli.test_bad_input import one_error

USAGE: dict[str, tuple[list[object], str]] = {
    "no bench": (["bench"], "no bench was given; allowed: attention, decode\nhint: try hybridkv bench attention"),
    "mistyped bench": (
        ["bench", "attentoin"],
        "unknown bench 'attentoin'; allowed: attention, decode\nhint: did you mean 'bench attention'",
    ),
    "option before the bench": (["bench", "--quick"], "unknown bench '--quick'; allowed: attention, decode"),
    "bench: mistyped option": (
        ["bench", "attention", "--quik"],
        "unknown option '--quik'\nhint: did you mean '--quick'",
    ),
    "bench: option of the other": (["bench", "attention", "--depths", "0"], "unknown option '--depths'"),
    "bench: peer": (["bench", "attention", "--against", "ik,lc"], "unknown peer 'lc'; allowed: ik, torch\nhint: try"),
    "bench: peer of the other": (["bench", "decode", "--against", "torch"], "unknown peer 'torch'; allowed: ik"),
    "bench: type": (["bench", "attention", "--types", "q9"], "unknown KV cache type 'q9'"),
    "bench: no types": (["bench", "decode", "--types", ","], "--types is empty; allowed: "),
    "bench: threads": (["bench", "decode", "-t", 0], "-t 0; allowed: 1 to 1024"),
    "bench: shape of words": (["bench", "attention", "--shape", "a,b"], "--shape 'a,b'; allowed: five numbers"),
    "bench: no tokens": (["bench", "attention", "--shape", "64,4,2,0,9"], "T 0; allowed: 1 to "),
    "bench: more new than stored": (
        ["bench", "attention", "--shape", "64,4,2,9,8"],
        "T 9; allowed: at most the 8 stored tokens",
    ),
    "bench: group": (["bench", "attention", "--shape", "64,5,2,1,8"], "5 heads; allowed: multiples of the 2 KV heads"),
    "bench: head dim": (["bench", "attention", "--shape", "40,4,2,1,8"], "head dim 40; allowed: multiples of 32"),
    "bench: depths": (["bench", "decode", "--depths", "0,x"], "--depths '0,x'; allowed: token counts"),
    "bench: depth": (["bench", "decode", "--depths", "99999999"], "--depths 99999999; allowed: 0 to"),
    "bench: prompt": (["bench", "decode", "--prompt", 0], "--prompt 0; allowed: 1 to"),
    "bench: steps": (["bench", "decode", "-n", 0], "-n 0; allowed: 1 to"),
    "bench: activations": (["bench", "decode", "--activations", "int4"], "--activations 'int4'; allowed: int16, int8"),
    "bench: backend": (["bench", "decode", "--backend", "fast"], "--backend 'fast'; allowed: auto, native, eager"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage(cli: Cli, name: str) -> None:
    argv, message = USAGE[name]
    done = cli(*argv)
    assert re.search(message, one_error(done)), done.err
    assert "layers," not in done.err
