"""The examples of the client's README run as they stand, but for the address."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from contract_double import COMPLETION, ContractDouble

README = (Path(__file__).parents[2] / "clients" / "python" / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE))


def test_every_block_of_code_is_an_example_that_is_run() -> None:
    assert len(EXAMPLES) == README.count("```python") == README.count("http://127.0.0.1:8000")


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_example_runs(title: str, double: ContractDouble, capsys: pytest.CaptureFixture[str]) -> None:
    program = EXAMPLES[title].replace("http://127.0.0.1:8000", double.url)
    if title == "Errors":
        double.error(503, "overloaded", retry_after="3")
    exec(compile(program, f"README.md: {title}", "exec"), {"__name__": "__main__"})
    assert {
        "Complete": COMPLETION["choices"][0]["text"],
        "Stream": "Käufer muß",
        "Score": "5 54.5 → 36.5",
        "Change datastores while the server runs": "smollm2@law",
        "In an event loop": "[' shall', ' shall']",
        "Errors": "try again in 3.0 s",
    }[title] in capsys.readouterr().out
