"""What the builder and the server of knnlm share: language model adapter, datastore, kNN maths."""

__version__ = "0.1.0"
