"""A conversation in the terminal and in the browser."""
