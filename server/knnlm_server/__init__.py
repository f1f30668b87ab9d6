"""Online server: continuous batching over a language model and swappable datastores."""
