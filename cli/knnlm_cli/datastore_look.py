"""Subcommands of `knnlm datastore` that change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knnlm_cli.datastore_options import AsJson, Given, GivenVersion, console, print_json
from knnlm_cli.datastore_place import Place, read_place
from knnlm_core.errors import DatastoreConflict, InvalidParameter

_FORMATS = "*.jsonl and *.jsonl.gz hold documents, *.parquet holds entries"


def list_(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of datastores.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """List the datastores under a root.

    Examples:
        knnlm datastore list ./datastores
        knnlm datastore list ./datastores --json
    """
    from knnlm_cli.datastore_facts import list_datastores
    from knnlm_cli.datastore_table import print_list

    cards = list_datastores(root)
    if as_json:
        print_json({"object": "list", "data": cards})
    else:
        print_list(console(), cards)


def inspect(place: GivenVersion, as_json: AsJson = False) -> None:
    """Show what a datastore holds, what it was made from and what was learned and deleted since.

    Examples:
        knnlm datastore inspect ./datastores/law
        knnlm datastore inspect ./datastores/law@0123456789abcdef --json
    """
    from knnlm_cli import datastore_facts
    from knnlm_cli.datastore_table import print_inspection

    found = datastore_facts.inspect(read_place(place, with_version=True))
    if as_json:
        print_json(found)
    else:
        print_inspection(console(), found)


def verify(
    place: Annotated[
        str,
        typer.Argument(
            metavar="ROOT/NAME[@VERSION]", help="The datastore; by default all its versions.", show_default=False
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Compare all checksums, read ledger and tail, and let the index find its canaries again.

    The first thing that is damaged is named, and the exit status is 1.

    Examples:
        knnlm datastore verify ./datastores/law
    """
    from knnlm_cli.datastore_progress import shown_progress
    from knnlm_cli.datastore_table import print_verification
    from knnlm_core.datastore.maintenance import verify as core  # imports faiss

    root, name, version = read_place(place, with_version=True)
    with shown_progress() as progress:
        done = core.verify(root, name, version, progress=progress)
    if as_json:
        checks = [{**check._asdict(), "self_test": check.self_test._asdict()} for check in done.versions]
        print_json({"object": "datastore.verification", "name": name, **done._asdict(), "versions": checks})
    else:
        print_verification(console(), name, done)


def diff(
    place: Given,
    a: Annotated[
        str | None, typer.Argument(help="The older version; by default the one before the current one.")
    ] = None,
    b: Annotated[str | None, typer.Argument(help="The newer version; by default the current one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two versions: documents by the digest of their text, entries, settings.

    Examples:
        knnlm datastore diff ./datastores/law
        knnlm datastore diff ./datastores/law 0123456789abcdef fedcba9876543210
    """
    from knnlm_cli.datastore_progress import shown_progress
    from knnlm_cli.datastore_table import print_diff
    from knnlm_core.datastore import layout
    from knnlm_core.datastore.maintenance import diff as core

    where = read_place(place)
    newer = b or layout.read_current(where.root, where.name).version
    with shown_progress() as progress:
        found = core.diff(where.root, where.name, a or _previous(where), newer, progress=progress)
    if as_json:
        settings = {field: change._asdict() for field, change in found.settings.items()}
        content = {**found._asdict(), "entries": found.entries._asdict(), "settings": settings}
        print_json({"object": "datastore.diff", "name": where.name, **content})
    else:
        print_diff(console(), found)


def export(
    place: GivenVersion,
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="*.jsonl or *.jsonl.gz for documents, *.parquet for entries.")
    ],
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Documents: also those kept out of the entries for calibration.")
    ] = False,
    keys: Annotated[bool, typer.Option("--keys", help="Entries: also their keys.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the documents that are not deleted as JSON Lines that `knnlm build` reads, or the entries as a table.

    Examples:
        knnlm datastore export ./datastores/law law.jsonl.gz
        knnlm datastore export ./datastores/law entries.parquet --keys
    """
    from knnlm_cli.datastore_progress import shown_progress
    from knnlm_core.datastore.maintenance import export as core

    root, name, version = read_place(place, with_version=True)
    is_entries = path.name.endswith(core.ENTRY_SUFFIXES)
    for option, given, fits in (("--held-out", held_out, not is_entries), ("--keys", keys, is_entries)):
        if given and not fits:
            raise InvalidParameter(f"{option} means nothing for {path.name}: {_FORMATS}", param="path")
    with shown_progress() as progress:
        if is_entries:
            count = core.export_entries(root, name, path, version=version, keys=keys, progress=progress)
        else:
            count = core.export_documents(root, name, path, version=version, held_out=held_out, progress=progress)
    kind = "entries" if is_entries else "documents"
    if as_json:
        print_json({"object": "datastore.export", "name": name, "path": str(path), kind: count})
    else:
        console().print(f"{count:,} {kind} of {name} in {path}", soft_wrap=True)


def _previous(place: Place) -> str:
    from knnlm_core.datastore import layout
    from knnlm_core.datastore.history import previous

    before = previous(place.root, place.name)
    if before is None:
        known = ", ".join(layout.published_versions(place.root, place.name))
        raise DatastoreConflict(f"no version of {place.name!r} was current before; name two of: {known}")
    return before.version
