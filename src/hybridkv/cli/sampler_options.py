"""Options that say how tokens are drawn, by llama-cli's names, for `run`, `chat`, and requests that do not say."""

from __future__ import annotations

import argparse
import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hybridkv.cli.show import notice
from hybridkv.errors import UsageError
from hybridkv.options import SAMPLERS

if TYPE_CHECKING:
    from hybridkv.engine import SamplingParams
    from hybridkv.engine.load import Loaded

_TEMP = 0.8


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group `sampling`."""
    group = parser.add_argument_group("sampling")
    group.add_argument("-s", "--seed", type=int, metavar="N", help="random seed; -1: a new one each time (default -1)")
    group.add_argument(
        "--temp",
        "--temperature",
        type=float,
        default=_TEMP,
        metavar="X",
        help=f"temperature; 0 is greedy (default {_TEMP})",
    )
    _add_filters(group, in_requests=False)


def add_sampling_defaults(group: argparse._ActionsContainer) -> None:
    """Add the same for requests that do not say."""
    group.add_argument("-s", "--seed", type=int, metavar="N", help="seed of each answer; -1: a fresh one (default -1)")
    group.add_argument(
        "--temp",
        "--temperature",
        type=float,
        metavar="X",
        help="temperature; 0 is greedy (default 1, as OpenAI's)",
    )
    _add_filters(group, in_requests=True)


def _add_filters(group: argparse._ActionsContainer, *, in_requests: bool) -> None:
    for option in SAMPLERS:
        default = option.default_in_requests if in_requests else option.default
        metavar = "N" if option.kind is int else "X"
        text = f"{option.help} (default {default:g})"
        group.add_argument(*option.flags, dest=option.name, type=option.kind, metavar=metavar, help=text)
    group.add_argument(
        "--dry-sequence-breaker",
        action="append",
        metavar="TEXT",
        help="DRY: text that ends a repetition, instead of llama.cpp's four defaults; none: no breakers; repeatable",
    )
    group.add_argument(
        "--samplers",
        metavar="A;B;...",
        help="filters in this order, the others off, by llama.cpp's names (default: "
        "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature)",
    )
    group.add_argument(
        "--sampler-seq", "--sampling-seq", metavar="LETTERS", help="the same by letters (default edskypmxt)"
    )
    group.add_argument(
        "-l",
        "--logit-bias",
        action="append",
        metavar="ID(+/-)X",
        help="add X to a token's logit: 15043+1, 15043-1; repeatable",
    )


def sampling_from(a: argparse.Namespace) -> SamplingParams:
    """Build the parameters as the engine takes them; `sampling_for` makes them a model's.

    Raises
    ------
    UsageError
        For a value that is not allowed.
    """
    from hybridkv.engine import SamplingParams
    from hybridkv.engine.sampler_order import in_order, order_from

    _check_seed(a)
    given = _given(a)
    seed = secrets.randbits(32) if a.seed in (None, -1) else a.seed
    bias = tuple(_bias(text) for text in a.logit_bias or ())
    params = SamplingParams(temp=a.temp, seed=seed, logit_bias=bias, **given)
    order = order_from(a.samplers, a.sampler_seq)
    params = in_order(params, order)
    if order is not None:
        _say_left_out(given | ({"temp": a.temp} if a.temp != _TEMP else {}), params)
    if a.temp == 0:
        idle = [option.flags[0] for option in SAMPLERS if option.greedy_ignores and option.name in given]
        idle += ["--seed"] * (a.seed is not None)
        if idle and not params.moves_the_likeliest:
            notice(f"--temp 0 always takes the most likely token; without effect: {', '.join(idle)}")
        if a.parallel > 1:
            notice(f"--temp 0 is greedy: all {a.parallel} sequences will be the same")
    return params


def sampling_defaults(a: argparse.Namespace) -> dict[str, Any]:
    """Read what requests are drawn with that do not say, by the names that requests have.

    Raises
    ------
    UsageError
        For a value that is not allowed.
    """
    from hybridkv.engine import SamplingParams
    from hybridkv.engine.sampler_order import NAMES, order_from

    _check_seed(a)
    order = order_from(a.samplers, a.sampler_seq)
    if order is not None and order != tuple(name for name in NAMES if name in order):
        raise UsageError(
            f"--samplers in another order than {', '.join(NAMES)}: requests keep that one",
            hint="leave --samplers out; `run` and `chat` take any order",
        )
    given = _given(a) | ({} if a.temp is None else {"temp": a.temp})
    biases = dict(_bias(text) for text in a.logit_bias or ())
    SamplingParams(**given, logit_bias=tuple(biases.items()))  # says what is wrong
    names = {option.name: option.in_requests for option in SAMPLERS} | {"temp": "temperature"}
    fields: dict[str, Any] = {names[name]: value for name, value in given.items()}
    if a.seed not in (None, -1):
        fields["seed"] = a.seed % 2**63
    if biases:
        fields["logit_bias"] = {str(token): bias for token, bias in biases.items()}
    if a.dry_sequence_breaker is not None:
        words = a.dry_sequence_breaker
        fields["dry_sequence_breakers"] = [] if words == ["none"] else words
    return fields


def _say_left_out(given: Mapping[str, Any], params: SamplingParams) -> None:
    """Name the options whose filter an order leaves out."""
    idle = [f"--{name.replace('_', '-')}" for name, value in given.items() if getattr(params, name) != value]
    if idle:
        notice(f"--samplers leaves their filter out; without effect: {', '.join(idle)}")


def _check_seed(a: argparse.Namespace) -> None:
    if a.seed is not None and not -1 <= a.seed < 2**64:
        raise UsageError(f"--seed {a.seed}; allowed: 0 to {2**64 - 1}, or -1 for a fresh one")


def _given(a: argparse.Namespace) -> dict[str, Any]:
    """Collect the filters that were given."""
    values = ((option.name, getattr(a, option.name)) for option in SAMPLERS)
    return {name: value for name, value in values if value is not None}


def sampling_for(params: SamplingParams, a: argparse.Namespace, loaded: Loaded) -> SamplingParams:
    """Fit the parameters to a model: DRY's breakers are its tokens."""
    if not params.dry_multiplier or loaded.tokenizer is None:
        return params
    from hybridkv.text.breakers import DRY_BREAKERS, breaker_ids

    words = a.dry_sequence_breaker
    words = DRY_BREAKERS if words is None else () if words == ["none"] else words
    return replace(params, dry_breakers=breaker_ids(loaded.tokenizer, words))


_FORBIDS = -1e9
"""A bias that no other makes up for."""


def _bias(text: str) -> tuple[int, float]:
    """Parse `15043+1` as (15043, 1.0), and `2-inf`, llama.cpp's way to forbid a token, as the least bias."""
    found = re.fullmatch(r"(\d{1,9})([+-].+)", text)
    try:
        if found is None:
            raise ValueError
        return int(found[1]), _FORBIDS if found[2].lower() == "-inf" else float(found[2])
    except ValueError:
        raise UsageError(
            f"--logit-bias {text!r}; allowed: a token id, + or -, and a number", hint="--logit-bias 15043-1"
        ) from None
