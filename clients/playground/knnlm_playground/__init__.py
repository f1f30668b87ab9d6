"""A web page that shows where each token came from; it talks to a knnlm server through the Python client alone."""
