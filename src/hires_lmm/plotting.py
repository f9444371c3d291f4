"""matplotlib, which is optional."""

from typing import Any


def import_pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files only.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib, or the extra `train`.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
