"""One reducer at one budget, run on one prompt or over a file; resumable."""
