"""What operators see: logs, later metrics and traces."""
