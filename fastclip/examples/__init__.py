"""Runnable examples, each a file to read in five minutes: ``fastclip example`` lists them.

All of them train on real data that packages bring along, bare and with fastclip, from the same initial weights, over
the same batches and with several seeds; and say what came of it, computed from their own runs. ``command.py``,
``extras.py`` and ``study.py`` are what they share; ``weather.py`` is ``fastclip demo``, ``grid_search.py`` is
``fastclip grid-search``.
"""

# Modules here, each with Settings, NEEDS, run and main, in the order to read them in.
EXAMPLES: tuple[str, ...] = (
    "rnn",
    "forecast",
    "translation",
    "sentiment",
    "gpt",
    "gan",
    "long_sequences",
    "vanishing",
    "regularisation",
)
