"""Pure functions on tensors: selectors, mergers and gates that methods are composed of."""
