"""Filters of a draw, option by option: parameters, command lines, requests and their checks derive from this table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplerOption:
    """One number that a filter takes.

    Attributes
    ----------
    name
        The field of `SamplingParams`.
    flags
        On the command line, as llama.cpp spells them; the first one is named in messages.
    kind
        `int` or `float`.
    default
        In Python and on the command line: llama-cli's.
    help
        On the command line, without the default.
    least, most
        Allowed values; None without an upper bound.
    allowed
        The same in words.
    request
        What the API's document says of it.
    open_below
        Whether `least` itself is not allowed.
    request_default
        In requests, where OpenAI's default is another one.
    request_name
        In requests, where it is another one.
    for_requests
        Least value in requests, where it is another one.
    greedy_ignores
        Whether it changes nothing at temperature 0.
    is_theirs
        Whether llama.cpp has it.
    variable
        llama.cpp's environment variable.
    """

    name: str
    flags: tuple[str, ...]
    kind: type[int] | type[float]
    default: float
    help: str
    least: float
    most: float | None
    allowed: str
    request: str
    open_below: bool = False
    request_default: float | None = None
    request_name: str = ""
    for_requests: float | None = None
    greedy_ignores: bool = False
    is_theirs: bool = True
    variable: str = ""

    @property
    def in_requests(self) -> str:
        """The name in requests."""
        return self.request_name or self.name

    @property
    def default_in_requests(self) -> float:
        """The value of a request that does not say."""
        return self.default if self.request_default is None else self.request_default

    def allows(self, value: float) -> bool:
        """Check whether a value is in range; NaN never is."""
        above = value > self.least if self.open_below else value >= self.least
        return above and (self.most is None or value <= self.most)


_ALL = "more than 0, at most 1 (keeps all)"

SAMPLERS = (
    SamplerOption(
        "top_k", ("--top-k",), int, 40, "keep the N most likely tokens; 0 keeps all",
        0, None, "0 (keeps all) or more", "not OpenAI's; default 0: keeps all",
        request_default=0, greedy_ignores=True, variable="LLAMA_ARG_TOP_K",
    ),
    SamplerOption(
        "top_p", ("--top-p",), float, 0.95, "keep the likeliest tokens that sum to X; 1 keeps all",
        0, 1, _ALL, "default 1: keeps all",
        open_below=True, request_default=1, greedy_ignores=True, variable="LLAMA_ARG_TOP_P",
    ),
    SamplerOption(
        "min_p", ("--min-p",), float, 0.05, "keep tokens with at least X times the best one's probability",
        0, 1, "0 (keeps all) to 1", "not OpenAI's; default 0: keeps all",
        request_default=0, greedy_ignores=True, variable="LLAMA_ARG_MIN_P",
    ),
    SamplerOption(
        "typical_p", ("--typical", "--typical-p"), float, 1, "locally typical sampling; 1 keeps all",
        0, 1, _ALL, "not OpenAI's; default 1: keeps all", open_below=True,
    ),
    SamplerOption(
        "top_n_sigma", ("--top-nsigma", "--top-n-sigma"), float, -1,
        "keep tokens within X standard deviations of the best logit; -1 keeps all",
        -1000, 1000, "-1 (keeps all) to 1000", "not OpenAI's; default -1: keeps all", for_requests=-1,
    ),
    SamplerOption(
        "repeat_penalty", ("--repeat-penalty",), float, 1, "divide logits of recent tokens by X; 1: off",
        0, 100, "more than 0, at most 100", "not OpenAI's; default 1: none",
        open_below=True, variable="LLAMA_ARG_REPEAT_PENALTY",
    ),
    SamplerOption(
        "repeat_last_n", ("--repeat-last-n",), int, 64, "tokens that the penalties look back on; 0: none, -1: all",
        -1, None, "-1 (the context), 0 (off) or more",
        "not OpenAI's; newest tokens that penalties look at; default 64, -1: all",
    ),
    SamplerOption(
        "presence_penalty", ("--presence-penalty",), float, 0, "subtract X from recent tokens' logits",
        -100, 100, "-100 to 100", "what a token costs that came before", variable="LLAMA_ARG_PRESENCE_PENALTY",
    ),
    SamplerOption(
        "frequency_penalty", ("--frequency-penalty",), float, 0,
        "subtract X from a recent token's logit for each occurrence",
        -100, 100, "-100 to 100", "what it costs each time that it came", variable="LLAMA_ARG_FREQUENCY_PENALTY",
    ),
    SamplerOption(
        "dry_multiplier", ("--dry-multiplier",), float, 0,
        "DRY: penalty of extending a repetition, times base^length; 0: off",
        0, 100, "0 (off) to 100", "not OpenAI's; default 0: off",
    ),
    SamplerOption(
        "dry_base", ("--dry-base",), float, 1.75, "DRY: base of the penalty",
        1, 100, "1 to 100", "not OpenAI's; default 1.75",
    ),
    SamplerOption(
        "dry_allowed_length", ("--dry-allowed-length",), int, 2, "DRY: longest free repetition",
        1, None, "1 or more", "not OpenAI's; default 2",
    ),
    SamplerOption(
        "dry_last_n", ("--dry-penalty-last-n",), int, -1, "DRY: tokens to look back on; -1: all",
        -1, None, "-1 (the context), 0 (off) or more", "not OpenAI's; default -1: all",
        request_name="dry_penalty_last_n",
    ),
    SamplerOption(
        "xtc_probability", ("--xtc-probability",), float, 0,
        "XTC: probability of removing the likeliest tokens; 0: off",
        0, 1, "0 (off) to 1", "not OpenAI's; default 0: off",
    ),
    SamplerOption(
        "xtc_threshold", ("--xtc-threshold",), float, 0.1,
        "XTC: of the tokens above X, all but the least likely are removed",
        0, 1, "0 to 1; more than 0.5 is off", "not OpenAI's; default 0.1",
    ),
)  # fmt: skip
"""In the order of help."""
