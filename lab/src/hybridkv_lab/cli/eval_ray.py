"""`hybridkv eval --ray`: how a task comes to its model, and what Ray is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridkv.cli.model_options import open_model
from hybridkv.cli.ray_options import check_ray, connect
from hybridkv.cli.show import model_path
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv_lab.candidates import Candidate
    from hybridkv_lab.corpus import Corpus
    from hybridkv_lab.evaluate import Evaluator, Mode
    from hybridkv_lab.journal import Journal
    from hybridkv_lab.run import Evaluation

_MODEL_OPTIONS = ("model", "ctx_size", "threads", "device", "backend", "graph", "weights", "trust_remote_code")


@dataclass(frozen=True, slots=True)
class ModelLoader:
    """The options that say which model runs and how, and the tokens of a window."""

    options: tuple[tuple[str, Any], ...]
    n_ctx: int

    def __call__(self) -> Evaluator:
        """Load the model."""
        from hybridkv.model import kv_facts
        from hybridkv_lab.evaluate import Evaluator

        opened = open_model(argparse.Namespace(**dict(self.options)))
        loaded, step = opened.load()
        return Evaluator(loaded.model, step, kv_facts(opened.description.facts), self.n_ctx)


def prepare(a: argparse.Namespace) -> None:
    """Check what tasks elsewhere need, before a model is touched.

    Raises
    ------
    UsageError
        Without Ray, or for a device that is one machine's.
    """
    check_ray()
    if ":" in a.device:
        raise UsageError(
            f"--device {a.device} with --ray; allowed: auto, cpu, cuda", hint="Ray assigns a device to each task"
        )
    a.threads = a.threads or 1
    if a.model is not None:
        a.model = str(model_path(a.model).resolve())  # a task may be elsewhere


def spread(
    a: argparse.Namespace,
    evaluator: Evaluator,
    corpus: Corpus,
    candidates: Sequence[Candidate],
    mode: Mode,
    journal: Journal,
) -> Evaluation:
    """Start Ray, or find it; the evaluation that runs there."""
    import torch

    from hybridkv_lab.ray_run import RayEvaluation

    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    n_gpus = int(a.device == "cuda")
    connect(a.ray, n_at_once=1, n_cpus=a.threads, n_gpus=n_gpus, what="tasks")
    a.ctx_size = corpus.n_ctx
    return RayEvaluation(
        evaluator,
        corpus,
        candidates,
        mode,
        journal,
        loader=ModelLoader(tuple((name, getattr(a, name)) for name in _MODEL_OPTIONS), corpus.n_ctx),
        resources={"num_cpus": a.threads, "num_gpus": n_gpus},
        n_greedy=a.greedy,
    )
