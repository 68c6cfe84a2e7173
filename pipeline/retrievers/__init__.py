"""sidmill."""
