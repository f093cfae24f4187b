"""Accuracy of reducers: answers to questions, scores and their confidence intervals."""
