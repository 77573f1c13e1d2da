"""Check, run, checkpoint, resume."""
