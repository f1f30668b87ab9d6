"""Pure tensor functions: distances → distribution → interpolation. No I/O, no state, any device."""
