"""`knnlm doctor`: is everything here that is needed, does it fit together, and does it compute what it should?"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from knnlm_cli.doctor_checks import Check, Probe
    from knnlm_core.datastore.maintenance.stages import StageProgress


def doctor(
    datastores: Annotated[
        Path | None,
        typer.Option(
            metavar="ROOT",
            help="Also verify every datastore under this folder; reads all files in full.",
            show_default=False,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Also ask the server at this address: is it ready, of which version?", show_default=False),
    ] = None,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test/--no-self-test",
            help="Build, search and serve with a random LM and compare with float64; a few seconds.",
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Check the installation: environment, packages, threads, GPU, disk, and whether all of it computes what it should.

    Nothing is downloaded or changed. Each check is ok, a warning or failed, and says what to do next. The exit status
    is 1 if a check failed, 0 otherwise.

    Examples:
        knnlm doctor
        knnlm doctor --datastores ./datastores --url http://127.0.0.1:8000
        knnlm doctor --no-self-test --json | jq '.checks[] | select(.status != "ok")'
    """
    from rich.console import Console

    from knnlm_cli.datastore_options import print_json
    from knnlm_cli.doctor_checks import Status, findings, worst
    from knnlm_cli.doctor_report import Finding, Printer, to_json

    printer = None if as_json else Printer(Console(highlight=False))
    found: list[Finding] = []
    for probe in _probes(datastores, url, self_test=self_test, silent=as_json):
        if printer is None:
            found += (Finding(probe.group, check) for check in findings(probe))
            continue
        printer.begin(probe.group)
        # Verifying datastores shows bars of its own.
        with nullcontext() if probe.group == "datastores" else printer.waiting(probe.name):
            for check in findings(probe):
                found.append(Finding(probe.group, check))
                printer.show(check)
    if printer is not None:
        printer.end(found)
    else:
        print_json(to_json(found))
    if worst(finding.check.status for finding in found) is Status.FAILED:
        raise typer.Exit(1)


def _probes(datastores: Path | None, url: str | None, *, self_test: bool, silent: bool) -> Iterator[Probe]:
    """Cheap ones first; what they import is imported when they are run."""
    from knnlm_cli import doctor_compute, doctor_environment, doctor_packages
    from knnlm_cli.doctor_checks import Probe

    yield Probe("environment", "python", doctor_environment.check_python)
    yield Probe("environment", "system", doctor_environment.check_system)
    yield Probe("environment", "cores", doctor_environment.check_cores)
    yield Probe("environment", "memory", doctor_environment.check_memory)
    yield Probe("environment", "variables", doctor_environment.check_variables)
    yield Probe("environment", "disk", partial(_disk, datastores))
    yield Probe("packages", "packages", doctor_packages.check_packages)
    yield Probe("packages", "torch", doctor_packages.check_torch)
    yield Probe("packages", "faiss", doctor_packages.check_faiss)
    yield Probe("packages", "extras", doctor_packages.check_extras)
    yield Probe("compute", "threads", doctor_compute.check_threads)
    yield Probe("compute", "gpu", doctor_compute.check_gpu)
    if datastores is not None:
        yield Probe("datastores", "datastores", partial(_datastores, datastores, silent))
    if url is not None:
        yield Probe("server", "server", partial(_server, url))
    if self_test:
        yield Probe("self-test", "self-test", _self_test)


def _disk(root: Path | None) -> Check:
    from knnlm_cli.doctor_datastores import largest_bytes
    from knnlm_cli.doctor_environment import check_disk

    return check_disk(root, 0 if root is None else largest_bytes(root))


def _datastores(root: Path, silent: bool) -> Iterator[Check]:
    from knnlm_cli.doctor_datastores import check_datastores
    from knnlm_core.datastore.maintenance.stages import silent as no_progress

    progress: AbstractContextManager[StageProgress] = nullcontext(no_progress)
    if not silent and sys.stderr.isatty():
        from knnlm_cli.datastore_progress import shown_progress

        progress = shown_progress()
    with progress as show:
        yield from check_datastores(root, show)


def _server(url: str) -> Check:
    from knnlm_cli.doctor_server import check_server

    return check_server(url)


def _self_test() -> Iterable[Check]:
    from knnlm_cli.doctor_selftest import self_test

    return self_test()
