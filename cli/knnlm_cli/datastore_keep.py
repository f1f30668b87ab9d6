"""Subcommands of `knnlm datastore` that change what lies there."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from knnlm_cli.datastore_options import AsJson, Documents, Given, console, print_json
from knnlm_cli.datastore_place import actor, read_place
from knnlm_core.errors import InvalidParameter


def compact(place: Given, as_json: AsJson = False) -> None:
    """Fold what was learned and deleted since into a new version, and make it current.

    No language model is needed. A server goes on with the version that it has until it is told to load the current one.

    Examples:
        knnlm datastore compact ./datastores/law
    """
    from knnlm_cli.datastore_facts import card
    from knnlm_cli.datastore_progress import shown_progress
    from knnlm_core.datastore import layout
    from knnlm_core.datastore.maintenance import compact as core  # imports faiss

    where = read_place(place)
    before = layout.read_current(where.root, where.name).version
    with shown_progress() as progress:
        version = core.compact(where.root, where.name, progress=progress, actor=actor())
    now = card(where)
    if as_json:
        print_json(
            {"object": "datastore.compaction", "compacted_from": before, "changed": version != before, "datastore": now}
        )
    elif version == before:
        console().print(f"nothing to fold: version {version} of {where.name} holds all that was learned and deleted")
    else:
        console().print(
            f"{where.name}: version {before} → {version}, {now['documents']:,} documents, {now['entries']:,} entries"
        )


def forget(place: Given, documents: Documents, as_json: AsJson = False) -> None:
    """Delete documents: no search of any version finds them any more. Their text stays on the disk; see purge.

    Examples:
        knnlm datastore forget ./datastores/law page-17 page-18
    """
    from knnlm_core.datastore.maintenance.forget import forget as core

    root, name, _ = read_place(place)
    revision = core(root, name, documents, actor=actor())
    if as_json:
        print_json({"object": "datastore.revision", "name": name, "revision": revision, "documents": documents})
    else:
        console().print(f"deleted {len(documents)} documents of {name}: revision {revision}")


def purge(
    place: Given,
    documents: Documents,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a datastore forget documents for good, and prove it.

    Every version and everything learned that holds one of them is written anew without it, the old files are removed,
    and all files are searched for their text, keys and tokens. There is no way back. Unfinished builds of the name
    are discarded. A server must load the current version afterwards to let go of the old one.

    Examples:
        knnlm datastore purge ./datastores/law page-17
        knnlm datastore purge ./datastores/law page-17 --yes --json
    """
    from knnlm_cli.datastore_progress import shown_progress
    from knnlm_cli.datastore_table import print_purge
    from knnlm_core.datastore.maintenance import purge as core  # imports faiss

    root, name, _ = read_place(place)
    if not yes:
        _confirm(f"Remove {len(documents)} documents from every version of {name} for good?")
    with shown_progress() as progress:
        report = core.purge(root, name, documents, progress=progress, actor=actor())
    if as_json:
        proof = [search._asdict() for search in report.proof.searches]
        print_json(
            {
                "object": "datastore.purge",
                "name": name,
                "documents": report.documents,
                "revision": report.revision,
                "replaced_versions": report.versions,
                "replaced_segments": report.segments,
                "sought": report.sought,
                "searches": proof,
                "same_text": report.proof.same_text,
                "removed": report.removed,
            }
        )
    else:
        print_purge(console(), name, report)


def prune(
    place: Given,
    keep: Annotated[int, typer.Option(help="How many of the last versions to keep, the current one included.")],
    protect: Annotated[list[str] | None, typer.Option(help="A version to keep in any case; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old versions, their calibrations, and learned documents that every kept version holds itself.

    The current version and the one before it always stay.

    Examples:
        knnlm datastore prune ./datastores/law --keep 2 --dry-run
        knnlm datastore prune ./datastores/law --keep 2
    """
    from knnlm_core.datastore.maintenance import prune as core

    root, name, _ = read_place(place)
    removed = core.prune(root, name, keep, protect=protect or (), dry_run=dry_run)
    if as_json:
        print_json({"object": "datastore.pruning", "name": name, "dry_run": dry_run, "removed": removed})
        return
    for folder in removed:
        console().print(f"{'would remove' if dry_run else 'removed'} {name}/{folder}", soft_wrap=True)
    if not removed:
        console().print("nothing to remove")


def rollback(place: Given, as_json: AsJson = False) -> None:
    """Make current again what was current before; again, to go back further.

    Examples:
        knnlm datastore rollback ./datastores/law
    """
    from knnlm_core.datastore import history as core
    from knnlm_core.datastore import layout

    root, name, _ = read_place(place)
    before = layout.read_current(root, name)
    now = core.rollback(root, name, actor=actor())
    if as_json:
        print_json({"object": "datastore.rollback", "name": name, "from": before._asdict(), "to": now._asdict()})
    else:
        console().print(f"{name}: back from version {before.version} to {now.version}")


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise InvalidParameter("there is nobody to ask; give --yes to purge without a question", param="yes")
    typer.confirm(question, abort=True, err=True)
