"""Measuring: answers, accuracy with its uncertainty, time to the first token, reports."""
