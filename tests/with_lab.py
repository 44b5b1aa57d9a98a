"""Tests of what `hybridkv-lab` adds: left out where it is not installed, which the first lines of a run say."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

WITH_LAB = find_spec("hybridkv_lab") is not None
WHERE = "hybridkv-lab is not installed: pip install ./lab"
needs_lab = pytest.mark.skipif(not WITH_LAB, reason=WHERE)
