"""What operators see: logs, metrics and spans."""
