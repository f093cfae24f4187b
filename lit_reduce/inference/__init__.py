"""Running the model with a reducer at a budget: on a batch, over a file, with answers that are stored."""
