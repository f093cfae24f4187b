"""Pure functions on tensors from which reducers are built: selectors, mergers, scorers, gates."""
