"""Perplexity, retrieval, RULER, long tasks, comparisons: resumable trials."""
