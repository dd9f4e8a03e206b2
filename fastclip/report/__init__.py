"""A run that a monitor recorded -> a page, figures, and a view in the terminal while it runs."""
