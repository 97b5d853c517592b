"""memory/disk."""
