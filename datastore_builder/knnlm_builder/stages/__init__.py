"""The stages of a build, each one function from what the former left on disk."""
