"""Runnable examples: ``python -m fastclip.examples.weather``."""
