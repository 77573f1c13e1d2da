"""Load, extend the context, attach an adapter, save, merge."""
