"""Run all benchmarks, or those named with --only, one after the other."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# What each one is given beside --model and --work. Those that take a store come last: strided_protocol leaves it.
BENCHMARKS = {
    "encode_overhead": (),
    "prefix_cache": (),
    "swap_size": (),
    "reference_protocol": ("data",),
    "strided_protocol": ("data",),
    "lm_eval_agreement": ("data",),
    "scoring": ("data",),
    "swaps": ("data",),
    "adaptive": ("data",),
    "decode_step": ("data",),
    "streams": ("store",),
    "gated_decoding": ("data", "store"),
    "speculation": ("data", "store"),
    "serving": ("data", "store"),
    "cost_curves": ("data", "store"),
}


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="hub id, folder or GGUF file")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl.gz and eval.jsonl.gz")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="where datastores are built")
    parser.add_argument(
        "--only", nargs="*", choices=BENCHMARKS, help="which to run; without --data, those that need none"
    )
    args = parser.parse_args()
    store = args.work / "datastores" / "bench"
    for name in args.only or BENCHMARKS:
        needs = BENCHMARKS[name]
        if "data" in needs and args.data is None:
            if args.only:
                parser.error(f"{name} needs --data")
            continue
        command = [sys.executable, str(Path(__file__).parent / f"{name}.py"), "--model", args.model]
        command += ["--work", str(args.work)]
        command += ["--data", str(args.data)] if "data" in needs else []
        if "store" in needs and (store / "CURRENT").exists():
            command += ["--store", str(store)]
        print(f"== {name}", file=sys.stderr)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
