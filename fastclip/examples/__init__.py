"""Runnable examples: ``python -m fastclip.examples.weather``, ``python -m fastclip.examples.grid_search``."""
