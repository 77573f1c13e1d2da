"""RULER's synthetic tasks (arXiv 2404.06654)."""
