"""What `knnlm datastore` prints for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from knnlm_core.datastore.maintenance.diff import VersionDiff
    from knnlm_core.datastore.maintenance.purge import PurgeReport
    from knnlm_core.datastore.maintenance.verify import Verification

MAX_NAMED = 20  # documents or files, of each kind


def print_list(console: Console, cards: Sequence[Mapping[str, Any]]) -> None:
    """One row per datastore."""
    table = Table()
    for column in ("name", "version", "model"):
        table.add_column(column)
    for column in ("documents", "entries", "size", "learned", "deleted", "versions"):
        table.add_column(column, justify="right")
    for card in cards:
        if "error" in card:
            table.add_row(card["name"], Text(card["error"]["message"], style="red"))
            continue
        numbers = (card["documents"], card["entries"])
        learned = (card["learned_documents"], card["deleted_documents"], card["versions"])
        table.add_row(
            card["name"],
            card["version"],
            Text(card["model_name"]),
            *(f"{number:,}" for number in numbers),
            size(card["bytes"]),
            *(f"{number:,}" for number in learned),
        )
    console.print(table if cards else "no datastore is published there")


def print_inspection(console: Console, found: Mapping[str, Any]) -> None:
    """One version in full, the others in a row each."""
    manifest = found["manifest"]
    index, context, calibration = manifest["index"], manifest["context"], found["calibration"]
    rows = {
        "version": f"{found['version']}{' (current)' if found['current'] else ''}",
        "made from": manifest["parent_version"] or "text",
        "path": found["path"],
        "model": f"{manifest['lm']['model_name']}, fingerprint {found['model_fingerprint'][:16]}",
        "keys": f"{manifest['key']['dim']} × float16 of {manifest['key']['tap']}",
        "windows": f"{context['window']} tokens, stride {context['stride']}",
        "entries": f"{found['entries']:,} in {len(found['shards'])} shards, of {found['documents']:,} documents",
        "size": f"{size(found['bytes'])} in {found['files']} files",
        "index": index["factory"] + (f", nprobe {index['nprobe']}" if index["nprobe"] else ", scanned whole"),
        "calibration": "none" if calibration is None else _calibration(calibration),
        "quality": ", ".join(f"{name} {_short(value)}" for name, value in manifest["quality"].items()) or "–",
        "learned since": f"{found['learned_documents']:,} documents, {found['learned_entries']:,} entries",
        "deleted since": f"{found['deleted_documents']:,} documents",
        "revision": f"{found['revision']}, of which {manifest['revision']} are folded in",
        "rollback goes to": found["previous"] or "nothing",
    }
    table = Table(title=f"Datastore {found['name']}", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    console.print(table)
    if len(found["versions"]) > 1:
        console.print(_versions(found["versions"], found["version"]))


def print_verification(console: Console, name: str, done: Verification) -> None:
    """What was looked at."""
    for check in done.versions:
        tested = check.self_test
        asked = (
            f"recall@32 {tested.recall_at_32:.4f} of {tested.queries} canaries, at least {tested.needed:.4f} needed"
            if tested.queries
            else "no canaries"
        )
        console.print(f"version {check.version}: {check.files} files, {size(check.num_bytes)}, all whole; {asked}")
    console.print(
        f"{name} is whole: {len(done.versions)} versions, {done.segments} segments of the tail, {done.calibrations} "
        f"calibrations, ledger at revision {done.revision}"
    )
    for leftover in done.leftovers:
        console.print(f"left by interrupted work, or work under way: {leftover}", style="yellow")


def print_diff(console: Console, found: VersionDiff) -> None:
    """Documents by name where they are few, and settings that differ."""
    console.print(f"from {found.a} to {found.b}: {found.entries.a:,} → {found.entries.b:,} entries")
    for mark, kind in (("+", "added"), ("−", "removed"), ("~", "changed")):
        ids: tuple[str, ...] = getattr(found, kind)
        console.print(f"{len(ids):,} documents {kind}")
        for document_id in ids[:MAX_NAMED]:
            console.print(Text(f"  {mark} {document_id}"), soft_wrap=True)
        if len(ids) > MAX_NAMED:
            console.print(f"  … and {len(ids) - MAX_NAMED:,} more (all with --json)")
    console.print(f"{found.unchanged:,} documents unchanged")
    for field, change in found.settings.items():
        console.print(Text(f"{field}: {change.a} → {change.b}"), soft_wrap=True)


def print_purge(console: Console, name: str, report: PurgeReport) -> None:
    """What was replaced, and the outcome of the search."""
    for old, new in report.versions.items():
        console.print(f"version {old} → {new or 'removed: nothing else was in it'}")
    for revision, newer in report.segments.items():
        console.print(f"learned at revision {revision} → {newer or 'removed: nothing else was alive in it'}")
    sought = ", ".join(f"{count:,} {kind}" for kind, count in report.sought.items())
    shared = sum(search.shared for search in report.proof.searches)
    files = len({search.path for search in report.proof.searches})
    console.print(f"searched {files} files of {name} for {len(report.documents)} ids, {sought}: nothing is left")
    if not report.sought["keys"]:
        console.print("no copy was left to compare keys with: an earlier purge had removed them all")
    if shared:
        console.print(f"{shared:,} finds belong to documents that stay: equal contexts have equal keys")
    for document_id in report.proof.same_text:
        console.print(Text(f"document {document_id} stays, and its whole text is that of a purged one"), style="yellow")
    console.print("the ids stay in LEDGER and audit.jsonl, so that no rebuild brings the documents back", style="dim")


def size(count: int) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _versions(versions: Sequence[Mapping[str, Any]], shown: str) -> Table:
    table = Table(title="All versions", title_justify="left")
    table.add_column("version")
    table.add_column("made from")
    for column in ("revision", "documents", "entries", "size"):
        table.add_column(column, justify="right")
    for each in versions:
        numbers = (each["revision"], each["documents"], each["entries"])
        style = "bold" if each["version"] == shown else None
        cells = (each["version"], each["parent_version"] or "text", *(f"{n:,}" for n in numbers), size(each["bytes"]))
        table.add_row(*cells, style=style)
    return table


def _calibration(calibration: Mapping[str, Any]) -> str:
    helps = "" if calibration["helps"] else ", does not help"
    settings = f"k {calibration['k']}, τ {calibration['temperature']:.4g}, λ {calibration['lambda']:.3g}"
    if calibration.get("lambda_mode", "fixed") != "fixed":
        settings += f", set per token: {calibration['lambda_mode']}"
    return f"{calibration['id']}: {settings}{helps}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
