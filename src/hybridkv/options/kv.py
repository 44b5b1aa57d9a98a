"""The options of the KV cache, one by one: command lines, files, labels and arguments derive from this table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

OptionKind = Literal["type", "rotation", "override", "rule", "count", "switch"]

DEFAULT_TYPE = "f16"
TYPES = "f32 f16 bf16 q8_0 q8_1 q8_KV q6_0 q5_0 q5_1 q4_0 q4_1 iq4_nl hq4_nl hq3_nl hq2_nl"
"""The names in `hybridkv.formats.FORMATS`, which help must not wait for; a test holds them together."""


@dataclass(frozen=True, slots=True)
class KVOption:
    """One option.

    Attributes
    ----------
    name
        The field of `KVTypes`, or of `Policy` for an override: also the argument in Python and the key in files.
    flags
        On the command line; llama.cpp's or ik_llama.cpp's spelling where they have the option.
    kind
        `type` a format's name, `rotation` and `switch` true or false, `override` `TYPE,N`, `rule` a scale rule, `count`
        a number of tokens.
    metavar, help
        On the command line.
    is_theirs
        Whether llama.cpp or ik_llama.cpp has it.
    variable
        llama.cpp's environment variable.
    """

    name: str
    flags: tuple[str, ...]
    kind: OptionKind
    metavar: str | None
    help: str
    is_theirs: bool = False
    variable: str = ""

    @property
    def flag(self) -> str:
        """The spelling in messages."""
        return self.flags[0]

    @property
    def dest(self) -> str:
        """Argparse's name of it."""
        return self.flags[-1].removeprefix("--").replace("-", "_")

    @property
    def is_switch(self) -> bool:
        """True if it takes no value."""
        return self.kind in ("rotation", "switch")

    @property
    def in_requests(self) -> bool:
        """True if a request to a server may set it for itself."""
        return self.kind in ("type", "rotation", "count")


def _of_side(side: Literal["k", "v"]) -> Iterator[KVOption]:
    name = side.upper()
    yield KVOption(
        f"type_{side}",
        (f"-ct{side}", f"--cache-type-{side}"),
        "type",
        "TYPE",
        f"type of {name}: {TYPES} (default {DEFAULT_TYPE})",
        is_theirs=True,
        variable=f"LLAMA_ARG_CACHE_TYPE_{name}",
    )
    yield KVOption(
        f"rotate_{side}",
        (f"-{side}had", f"--{side}-cache-hadamard"),
        "rotation",
        None,
        f"rotate {name} with a Hadamard transform before quantizing; hq types always rotate",
        is_theirs=True,
    )
    for place in ("first", "last"):
        yield KVOption(
            f"{side}_{place}",
            (f"-ct{side}-{place}", f"--cache-type-{side}-{place}"),
            "override",
            "TYPE,N",
            f"type of {name} in the {place} N layers; only layers with a KV cache count",
            is_theirs=True,
        )


COMMON = (
    KVOption(
        "scale",
        ("--kv-scale",),
        "rule",
        "RULE",
        "scale rule: absmax (ggml's) or refit (least squares) (default: the better one for each type)",
    ),
    *(
        KVOption(
            name,
            (f"--kv-{name}",),
            "count",
            "N",
            f"keep the {which} N tokens as f16 in layers with a quantized K or V (default 0)",
        )
        for name, which in (("tail", "newest"), ("sink", "first"))
    ),
    KVOption(
        "center",
        ("--kv-center",),
        "switch",
        None,
        "subtract the mean of early tokens from K before quantizing; needs --kv-tail 32 or more",
    ),
)
"""Options that hold for all layers, whatever their types: a file with types for each layer says them once."""

EXACT = tuple(option for option in COMMON if option.name != "scale")
"""Options that keep rows exact, or shift them."""

_SIDES = (*_of_side("k"), *_of_side("v"))
OWN = tuple(option for kind in ("type", "rotation") for option in _SIDES if option.kind == kind)
"""What each layer has for itself."""

KV_OPTIONS = (*_SIDES, *COMMON)

_BY_NAME = {option.name: option for option in KV_OPTIONS}


def kv_option(name: str) -> KVOption:
    """Return the option of a name."""
    return _BY_NAME[name]
