"""Shared fixtures; `tiny` (models and tokenizers made on the spot) is importable from every test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# Tiny tensors gain nothing from more threads; hub look-ups must fail at once instead of waiting for a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

# Machines are shared: how long an example takes says nothing.
settings.register_profile("knnlm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("knnlm")
