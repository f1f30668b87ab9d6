"""Work on a name that makes or removes whole versions: compact, purge, prune; and looking at all that it has."""
