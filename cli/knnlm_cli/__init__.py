"""The `knnlm` command, put together from the subcommands that packages declare as entry points."""
