"""Why: a model that generates must have this base. `tests/integration/test_generate_modes.py` is our own matrix."""


class GenerationTesterMixin:
    """No test."""
