"""Reading pictures, questions and training data."""
