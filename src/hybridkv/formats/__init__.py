"""Formats of stored KV blocks: the records, their encode and decode in torch, their bytes.

Owns formats; knows no cache, no kernel and no model.
"""

from __future__ import annotations

from hybridkv.formats.block import KVFormat
from hybridkv.formats.packing import Plane, PlaneKind
from hybridkv.formats.rules import Scale, ScaleRule
from hybridkv.formats.table import FORMATS, get_format

__all__ = ["FORMATS", "KVFormat", "Plane", "PlaneKind", "Scale", "ScaleRule", "get_format"]
