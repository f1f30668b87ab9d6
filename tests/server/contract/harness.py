"""lm-evaluation-harness: tasks on the disk, runs of its command, results read back; and what its windows are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from offline import run_offline

# Of the yaml that all tasks share.
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
"""


_RUN_ALL = """\
import json, sys
from lm_eval.__main__ import cli_evaluate
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
"""


def write_task(folder: Path, name: str, rows: Iterable[Mapping[str, Any]], yaml: str) -> None:
    """A task over rows of one's own; ``yaml`` says what is asked of them."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(_TASK.format(name=name, rows=path) + yaml, encoding="utf-8")


@dataclass(frozen=True)
class Evaluation:
    """What a run leaves: metrics of each task, and what the model answered to each row."""

    metrics: dict[str, dict[str, float]]
    answers: dict[str, list[list[Any]]]


class Harness(NamedTuple):
    """A folder of tasks, and where runs may write."""

    tasks: Path
    folder: Path

    def arguments(self, name: str, backend: str, model_args: Mapping[str, object]) -> list[str]:
        """Of ``lm_eval`` for all tasks; its output goes where `read` finds it by name."""
        return [
            "run", "--model", backend, "--model_args", ",".join(f"{k}={v}" for k, v in model_args.items()),
            "--include_path", str(self.tasks), "--tasks", ",".join(task.stem for task in self.tasks.glob("*.yaml")),
            "--batch_size", "4", "--device", "cpu", "--log_samples", "--output_path", str(self.folder / name),
        ]  # fmt: skip

    def run(self, commands: list[list[str]]) -> str:
        """Run the command ``lm_eval`` with each list of arguments, in one process: its imports take longest."""
        return run_offline(["-c", _RUN_ALL, json.dumps(commands)], self.folder)

    def read(self, name: str) -> Evaluation:
        """What a run wrote."""
        (results,) = (self.folder / name).glob("*/results_*.json")
        metrics, answers = json.loads(results.read_text(encoding="utf-8"))["results"], {}
        for task in metrics:
            (samples,) = results.parent.glob(f"samples_{task}_*.jsonl")
            rows = map(json.loads, samples.read_text(encoding="utf-8").splitlines())
            answers[task] = [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        plain = {task: {name.partition(",")[0]: v for name, v in values.items()} for task, values in metrics.items()}
        return Evaluation(plain, answers)


class Window(NamedTuple):
    """Tokens for one forward pass, and how many of the last ones are scored."""

    token_ids: list[int]
    num_scored: int


def rolling_windows_of(token_ids: Sequence[int], prefix_id: int, max_length: int) -> Iterator[Window]:
    """How `local-completions` cuts a text for ``loglikelihood_rolling``; ``max_length`` is its model argument.

    The prefix token stands before the text. Windows score max_length − 2 tokens each, after one token of context; the
    last window scores what is left and is filled up with context from the left.
    """
    ids, size = [prefix_id, *token_ids], max_length - 2
    for first in range(1, len(ids), size):
        stop = min(first + size, len(ids))
        begin = max(0, stop - size - 1)
        yield Window(ids[begin:stop], stop - first)
