"""`knnlm datastore`: what lies under a root, whether it is whole, and how it is kept."""

from __future__ import annotations

import inspect

import typer

from knnlm_cli import datastore_keep, datastore_look

_HELP = """Look at datastores, and keep them: verify, compact, purge, prune, roll back, export.

    Examples:
        knnlm datastore list ./datastores
        knnlm datastore inspect ./datastores/law
        knnlm datastore purge --help
"""

datastore = typer.Typer(help=inspect.cleandoc(_HELP), no_args_is_help=True)
datastore.command("list")(datastore_look.list_)
for _command in (
    datastore_look.inspect,
    datastore_look.verify,
    datastore_look.diff,
    datastore_look.export,
    datastore_keep.compact,
    datastore_keep.forget,
    datastore_keep.purge,
    datastore_keep.prune,
    datastore_keep.rollback,
):
    datastore.command()(_command)
