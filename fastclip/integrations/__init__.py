"""One line in every framework: a small file for each, which imports it only when it is imported itself."""
