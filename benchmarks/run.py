"""Run all benchmarks, or those named with --only, one after the other."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

WITH_DATA = ("reference_protocol", "strided_protocol", "lm_eval_agreement", "scoring", "swaps")
# streams last: it uses the store that strided_protocol leaves
WITHOUT_DATA = ("encode_overhead", "prefix_cache", "swap_size", "streams")


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="hub id, folder or GGUF file")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl.gz and eval.jsonl.gz")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="where datastores are built")
    parser.add_argument("--only", nargs="*", choices=[*WITHOUT_DATA, *WITH_DATA], help="which to run")
    args = parser.parse_args()
    chosen = args.only or [*WITHOUT_DATA[:-1], *(WITH_DATA if args.data else ()), WITHOUT_DATA[-1]]
    store = args.work / "datastores" / "bench"
    for name in chosen:
        command = [sys.executable, str(Path(__file__).parent / f"{name}.py"), "--model", args.model]
        command += ["--work", str(args.work)]
        if name == "streams" and (store / "CURRENT").exists():
            command += ["--store", str(store)]
        if name in WITH_DATA:
            if args.data is None:
                parser.error(f"{name} needs --data")
            command += ["--data", str(args.data)]
        print(f"== {name}", file=sys.stderr)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
