"""Hostile input, seeded: generators of cases (`make_*.py`) apart from what is asked of the results (`check_*.py`)."""
