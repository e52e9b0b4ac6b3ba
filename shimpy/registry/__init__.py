"""The models that this machine has: found in folders, kept in an index, resolved by name."""
