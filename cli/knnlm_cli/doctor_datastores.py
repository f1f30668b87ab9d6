"""`knnlm doctor --datastores ROOT`: what is published there, whether it is whole, what interrupted builds left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from knnlm_cli.doctor_checks import Check, failed, ok, warning
from knnlm_cli.doctor_environment import gib
from knnlm_core.errors import KnnlmError

if TYPE_CHECKING:
    from knnlm_core.datastore.maintenance.stages import StageProgress


def check_datastores(root: Path, progress: StageProgress) -> Iterator[Check]:
    """One finding per name, and one of the names together; every file is read in full."""
    from knnlm_core.datastore import layout

    if not root.is_dir():
        remedy = "give the folder that `knnlm build --output` published to, or build a datastore first"
        yield failed("datastores", f"there is no folder {root}", remedy, root=str(root), names=[])
        return
    names = layout.published_names(root)
    facts = {"root": str(root), "names": names}
    if not names:
        remedy = "build one: knnlm build --model LM --input FILES --output " + str(root) + " --name NAME"
        if root.name and (root / layout.CURRENT).exists():
            remedy = f"this is a datastore itself; give the folder around it: --datastores {root.absolute().parent}"
        yield warning("datastores", f"nothing is published under {root}", remedy, **facts)
    else:
        yield ok("datastores", f"{len(names)} under {root}: {', '.join(names)}", **facts)
    for name in names:
        yield _published(root, name, progress)
    for name in _begun(root, names):
        left = [path.name for path in (root / name).glob(f"*{layout.BUILDING_SUFFIX}")]
        remedy = f"run the same knnlm build again, which goes on where it stopped; or remove {root / name}"
        yield warning(f"datastore {name}", "a first build is under way or was interrupted", remedy, leftovers=left)


def largest_bytes(root: Path) -> int:
    """Size of the largest current version, as its manifest has it; those that cannot be read count nothing."""
    from knnlm_core.datastore import layout
    from knnlm_core.datastore.manifest import Manifest

    sizes = [0]
    for name in layout.published_names(root) if root.is_dir() else ():
        try:
            current = layout.read_current(root, name).version
            sizes.append(Manifest.read(layout.version_folder(root, name, current) / layout.MANIFEST).num_bytes)
        except KnnlmError:
            continue  # the datastore's own check says why
    return max(sizes)


def _published(root: Path, name: str, progress: StageProgress) -> Check:
    from knnlm_core.datastore.maintenance.verify import verify  # imports faiss

    label = f"datastore {name}"
    try:
        done = verify(root, name, progress=progress)
    except KnnlmError as error:
        remedy = f"restore the file, go back (knnlm datastore rollback {root / name}), or build {name} anew"
        return failed(label, error.message, remedy, code=error.code)
    total = sum(version.num_bytes for version in done.versions)
    count = len(done.versions)
    message = f"{count} version{'s' if count > 1 else ''}, {gib(total)}, every checksum right, canaries found"
    facts = {
        "versions": [version.version for version in done.versions], "bytes": total, "revision": done.revision,
        "segments": done.segments, "leftovers": list(done.leftovers),
    }  # fmt: skip
    if done.leftovers:
        shown = ", ".join(done.leftovers[:3]) + (" …" if len(done.leftovers) > 3 else "")
        remedy = "if nothing is building it now, the next knnlm build of the name goes on with this or discards it"
        return warning(label, f"{message}; leftovers of interrupted work: {shown}", remedy, **facts)
    return ok(label, message, **facts)


def _begun(root: Path, names: list[str]) -> list[str]:
    """Names of which nothing is published yet, but a build has begun."""
    from knnlm_core.datastore import layout

    folders = (entry for entry in root.iterdir() if entry.is_dir() and layout.is_name(entry.name))
    return sorted(
        entry.name
        for entry in folders
        if entry.name not in names and next(entry.glob(f"*{layout.BUILDING_SUFFIX}"), None) is not None
    )
