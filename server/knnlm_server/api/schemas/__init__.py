"""Request and response bodies, one module per route."""
