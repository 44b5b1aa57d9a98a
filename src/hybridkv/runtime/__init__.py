"""The parts that any backend runs a model with: its cache under the guard's eye, attention over it, and the step.

Owns the way from new tokens to stored rows and to attention over them. Knows no Transformers: `hybridkv.hf` makes a
Transformers cache and attention function of it, `hybridkv.native` uses it as it is.
"""

from hybridkv.runtime.cache import ModelCache
from hybridkv.runtime.evidence import finite_rows, is_finite
from hybridkv.runtime.rows import WatchedRows
from hybridkv.runtime.states import States
from hybridkv.runtime.step import DraftStep, Fault, Step, StepResult, one_by_one
from hybridkv.runtime.stored import StoredCache, StoredState
from hybridkv.runtime.view import DeviceStep, LayerView, LayerWatch, Notify

__all__ = [
    "DeviceStep",
    "DraftStep",
    "Fault",
    "LayerView",
    "LayerWatch",
    "ModelCache",
    "Notify",
    "States",
    "Step",
    "StepResult",
    "StoredCache",
    "StoredState",
    "WatchedRows",
    "finite_rows",
    "is_finite",
    "one_by_one",
]
