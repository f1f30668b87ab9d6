"""The HTTP contract: routes, bodies, errors."""
