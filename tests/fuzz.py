"""The long run of schemathesis: every route, good data and bad, until a number of cases is reached.

python tests/fuzz.py --cases 20000   writes a report as JSON and as text; exit status 1 if anything was found
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "server")]

from chat_folder import with_template  # noqa: E402
from fuzzing import Outcome, fuzz, fuzzed_settings, total  # noqa: E402
from live_server import LiveServer, wait_until  # noqa: E402
from small_stores import publish  # noqa: E402

from tiny import save_tiny  # noqa: E402

RESULTS = HERE.parent / "benchmarks" / "results"


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000, help="at least this many")
    parser.add_argument("--seed", type=int, default=1, help="what the generated data begins with")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tiny matrices gain nothing from more
    with tempfile.TemporaryDirectory() as name:
        started = time.monotonic()
        runs = run(Path(name), args.cases, args.seed)
        report = summarise(runs, time.monotonic() - started, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "schemathesis.json").write_text(json.dumps(report, indent=1) + "\n")
    text = page(report)
    (args.output / "schemathesis.txt").write_text(text)
    print(text)
    for outcome in runs:
        if outcome.failed:
            print(outcome.output)
    return int(any(outcome.failed for outcome in runs))


def run(folder: Path, cases: int, seed: int) -> list[Outcome]:
    """Rounds of increasing seed, until there are as many cases as wanted."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    published = publish(save_tiny(folder / "models" / "tiny-lm"), folder)
    model = with_template(published.model, folder)
    outcomes: list[Outcome] = []
    with LiveServer(fuzzed_settings(model, published.root)) as server:
        routes = sum(len(item) for item in server.app.openapi()["paths"].values())
        while (done := sum(sum(total(outcome.cases).values()) for outcome in outcomes)) < cases:
            work = folder / f"round-{len(outcomes)}"
            work.mkdir()
            # Routes without a parameter have few cases: most rounds reach less than this.
            wanted = max(20, (cases - done) // routes)
            outcomes.append(fuzz(server, work, max_examples=wanted, seed=seed + len(outcomes)))
            wait_until(server.is_idle)  # nothing that was abandoned still runs or holds a lease
            if outcomes[-1].failed:
                break
    return outcomes


def summarise(outcomes: list[Outcome], seconds: float, seed: int) -> dict[str, Any]:
    """One report of all rounds."""
    routes: dict[str, dict[str, dict[str, int]]] = {}
    for outcome in outcomes:
        for route, counts in outcome.cases.items():
            for what, numbers in counts.items():
                into = routes.setdefault(route, {}).setdefault(what, {})
                for name, number in numbers.items():
                    into[name] = into.get(name, 0) + number
    return {
        "schemathesis": version("schemathesis"),
        "seed": seed,
        "rounds": len(outcomes),
        "seconds": round(seconds),
        "failed": any(outcome.failed for outcome in outcomes),
        "cases": sum(total(routes).values()),
        "statuses": dict(sorted(total(routes).items())),
        "routes": routes,
    }


def page(report: dict[str, Any]) -> str:
    """The report for people."""
    statuses = list(report["statuses"])
    verdict = (
        "something was found" if report["failed"] else "no server error, no answer that the document does not allow"
    )
    lines = [
        f"schemathesis {report['schemathesis']}: {report['cases']:,} cases over {len(report['routes'])} routes "
        f"in {report['seconds']} s: {verdict}",
        "",
        f"{'route':32}{'cases':>8}{'positive':>10}{'negative':>10}" + "".join(f"{status:>8}" for status in statuses),
    ]
    for route, counts in [*report["routes"].items(), ("all", _sum(report["routes"]))]:
        data, by_status = counts["data"], counts["statuses"]
        lines.append(
            f"{route:32}{sum(by_status.values()):>8}{data.get('positive', 0):>10}{data.get('negative', 0):>10}"
            + "".join(f"{by_status.get(status, 0):>8}" for status in statuses)
        )
    lines += ["", "What fits the schema and was refused with 400 all the same, for what no schema can say:"]
    refusals = _sum(report["routes"])["refusals"]
    lines += [f"{number:>8}  {reason}" for reason, number in sorted(refusals.items(), key=lambda item: -item[1])]
    return "\n".join([*lines, ""])


def _sum(routes: dict[str, Any]) -> dict[str, dict[str, int]]:
    whole: dict[str, dict[str, int]] = {"data": {}, "statuses": {}, "refusals": {}}
    for counts in routes.values():
        for what, into in whole.items():
            for name, number in counts[what].items():
                into[name] = into.get(name, 0) + number
    return whole


if __name__ == "__main__":
    sys.exit(main())
