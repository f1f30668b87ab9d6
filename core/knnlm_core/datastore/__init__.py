"""Datastores on disk: layout, manifest, arrays, documents, index, writer, publishing, reader.

Everything that a reader takes from a file is checked against the manifest first; `docs/datastore-format.md` lists
every file, field and check.
"""
