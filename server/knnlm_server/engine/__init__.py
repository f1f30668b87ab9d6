"""The engine: schedule, forward, mix, sample, emit."""
