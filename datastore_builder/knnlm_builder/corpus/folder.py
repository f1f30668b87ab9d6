"""Which files of a folder belong to a corpus, in which order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from knnlm_builder.corpus.stats import CorpusStats


class FoundFile(NamedTuple):
    """A regular file below a folder."""

    path: Path
    relative: str  # to the folder, with forward slashes


class _Level(NamedTuple):
    """A folder being walked."""

    path: Path
    relative: str  # empty, or ending in a slash
    real: str  # its path without symbolic links
    names: Iterator[str]  # what is still to visit; folders end in a slash


def walk_folder(root: Path, stats: CorpusStats) -> Iterator[FoundFile]:
    """Walk a folder's regular files sorted by relative path, one listing per level of folders in memory.

    The order is that of the relative paths' code points, the same on every machine and file system. Hidden files and
    folders are skipped, and so are symbolic links that leave ``root``, lead back to a folder being walked, or lead
    nowhere; all are counted in ``stats``, as are sockets, pipes and devices.

    Raises: OSError: a folder cannot be listed.
    """
    levels: list[_Level] = []
    _enter(root, "", levels, stats)
    while levels:
        level = levels[-1]
        name = next(level.names, None)
        if name is None:
            levels.pop()
        elif name.endswith("/"):
            _enter(level.path / name, level.relative + name, levels, stats)
        else:
            yield FoundFile(level.path / name, level.relative + name)


def _enter(path: Path, relative: str, levels: list[_Level], stats: CorpusStats) -> None:
    # Only links need looking up; realpath would check the whole path again, level after level.
    is_plain = levels and not path.is_symlink()
    real = os.path.join(levels[-1].real, path.name) if is_plain else os.path.realpath(path)
    names = _list_folder(path, [*(level.real for level in levels), real], stats)
    levels.append(_Level(path, relative, real, iter(names)))


def _list_folder(folder: Path, real_parents: list[str], stats: CorpusStats) -> list[str]:
    # A folder sorts as `name/`, so that going depth first gives the order of the whole paths: `a-b` before `a/c`.
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                stats.hidden_skipped += 1
            elif entry.is_symlink() and not _link_stays_inside(entry, real_parents):
                stats.links_skipped += 1
            elif entry.is_dir():
                names.append(entry.name + "/")
            elif entry.is_file():
                names.append(entry.name)
            else:
                stats.files_skipped["(not a regular file)"] += 1
    return sorted(names)


def _link_stays_inside(link: os.DirEntry[str], real_parents: list[str]) -> bool:
    try:
        target = os.path.realpath(link.path, strict=True)
    except OSError:  # it leads nowhere, or in a circle
        return False
    return Path(target).is_relative_to(real_parents[0]) and target not in real_parents
