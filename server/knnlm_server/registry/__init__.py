"""Datastores by name: load, swap, lease, drain, unload."""
