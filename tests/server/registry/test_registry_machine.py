"""The registry and a model of it say the same, whatever is done in whatever order.

`REGISTRY_STEPS=10000` makes some ten thousand steps instead of a few hundred.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from registry_machine import RegistryMachine
from registry_stores import Stores

STEPS = int(os.environ.get("REGISTRY_STEPS", "400"))
STEPS_OF_A_RUN = 40


@pytest.mark.timeout(3600)
def test_registry_and_model_agree(published_stores: Stores) -> None:
    machine = type("Machine", (RegistryMachine,), {"stores": published_stores, "steps": 0})
    while machine.steps < STEPS:  # runs may be shorter than they might be
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=max(2, (STEPS - machine.steps) // STEPS_OF_A_RUN),
                stateful_step_count=STEPS_OF_A_RUN,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
