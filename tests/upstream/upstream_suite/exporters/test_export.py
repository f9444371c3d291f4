"""Why: test_modeling_common builds on it. Export of our model is no promise, so it tests nothing."""


class ExportTesterMixin:
    """No test."""
