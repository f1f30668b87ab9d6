"""Every command of the documentation that is not run, and why."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import NamedTuple

_ASSIGNED = re.compile(r"^([A-Za-z_]\w*=[^\s$]*\s+)+")


class NotRun(NamedTuple):
    """Commands of some pages that begin like this."""

    pages: str  # as a shell matches file names
    begins: str  # behind variables that are set for the command
    reason: str

    def holds(self, page: str, text: str) -> bool:
        """Whether this is of that command."""
        return fnmatch(page, self.pages) and _ASSIGNED.sub("", text).startswith(self.begins)


NOT_RUN = (
    NotRun("*", "make ", "installs, or runs for minutes; test_repository.py looks at the Makefile"),
    NotRun("*", "pip install", "the environment has everything, and tests install nothing"),
    NotRun("*", "docker ", "needs a container engine; test_containers.py holds what can be held without"),
    NotRun("*", ". .venv/bin/activate", "the test's environment is active"),
    NotRun("docs/tutorial.md", "from pathlib import Path", "writes half a megabyte, which takes minutes to build from"),
    NotRun("docs/runtimes.md", "knnlm serve --model SmolLM2-135M-Instruct.Q4_1.gguf", "needs llama.cpp, compiled"),
    NotRun("docs/runtimes.md", "knnlm serve --model ./models/lm --compile-steps", "compiles C++ for a minute"),
    NotRun("docs/observability.md", "knnlm serve …", "a synopsis: … stands for what else is given"),
    NotRun("*", "lm_eval ", "tests/server/contract/test_lm_eval.py runs these tasks, against a server and in float64"),
    NotRun("*", "guidellm ", "tests/server/contract/test_guidellm.py runs it"),
)  # fmt: skip


class Announced(NamedTuple):
    """An error that a page shows: it must name the code, and the command must get it."""

    page: str
    begins: str
    code: str


ANNOUNCED = (Announced("docs/secure.md", 'curl -H "Authorization: Bearer $KNNLM_API_KEY" -X PUT', "forbidden"),)

# What stands for something else on the pages, and where it is found on the stage.
OLDER_VERSION_OF_LAW = "0f3c5a7b9d1e2f40"

# Options in running text that belong to other programs.
FOREIGN_OPTIONS = {
    "--batch_size",
    "--device",
    "--model_args",
    "--build-arg",
    "--pairs",
    "--gguf",
    "--data",
    "--only",
    "--store",
}


def reason_not_to_run(page: str, text: str) -> str | None:
    """Why a command is not run; None if it is."""
    return next((entry.reason for entry in NOT_RUN if entry.holds(page, text)), None)


def announced_error(page: str, text: str) -> str | None:
    """The code that a command is said to be answered with."""
    return next((entry.code for entry in ANNOUNCED if entry.page == page and text.startswith(entry.begins)), None)
