"""The parts of benchmark/reproduce.py."""
