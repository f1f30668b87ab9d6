"""Offline builder: text in, published datastore out."""
