"""Passkey and needle in a haystack."""
