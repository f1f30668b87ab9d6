"""The examples of the client's README run as they stand, but for the address."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from contract_bodies import COMPLETION
from contract_double import ContractDouble

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
        "Chat": "Der Käufer muß",
        "Score": "5 54.5 → 36.5\n2–3 tokens in the datastore too: 4, 54.5\n32–… tokens in the datastore too: 1, 7.5\n",
        "Search less, and see when": "' shall': followed 3, learned 0.125 against 0.25\n0 searched, 1 followed\n",
        "Score what was generated": "5 3 2 [-3.5]\n",
        "Score much, with progress": "4 of 9 tokens\n1 act-7 1.25\n7 of 9 tokens\n0 act-7 1.25\nall: 36.5\n",
        "See what the datastore retrieves": "Act 7: The buyer[ shall] pay the price.\n' shall': p_knn=0.750 p_lm=0.500",
        "Mix several datastores, and see where an answer comes from": "' shall': ['law 0.75', 'news 0.25']\n"
        "the model itself: 25%\n50% law: Act 7\n25% law: deleted meanwhile\n",
        "Count tokens": "2 of 2048 ['The', ' shall']\n2\nThe shall <|endoftext|>\n",
        "Change datastores while the server runs": "['law'] loaded, and could be: ('medicine',)\ncurrent 2 50000\n"
        "['smollm2', 'smollm2@law']\nv2\n",
        "Learn and forget while the server runs": "[('manuals/valve', 12)] is revision 6\n"
        "31 files searched, {'v3': 'v4', 'v2': None}\nv4 120\n",
        "Look into versions and documents": "v2 118 on the disk\nv3 120 serving\n"
        "2 added: ['act-7', 'act-8'] changed settings: ['index.nlist', 'calibration']\n"
        "[11, 12] files are as they were published\nact-7 Act 7 The buyer shall pay the price.\nDer Käufe\n",
        "Load a datastore, with progress": "verify: 61000000 of 61000000\nswap: 0 of 1\n['statutes'] mean law\n",
        "In an event loop": "['The shall', 'The shall']",
        "Errors": "try again in 3.0 s",
        "Watch the server": "3 2 1\n",
        "Compatibility": "The shall\nDer Käufer muß\n",
    }[title] in capsys.readouterr().out
