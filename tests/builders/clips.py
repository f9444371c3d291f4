"""Small clips whose frames can be told apart, as arrays and as files."""

from pathlib import Path

import numpy as np


def counting_frames(number: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames of which number n is grey of 6 n: `(number, height, width, 3)` uint8, told apart also once encoded."""
    grey = (6 * np.arange(number, dtype=np.uint8)).reshape(-1, 1, 1, 1)
    return np.broadcast_to(grey, (number, height, width, 3)).copy()


def write_clip(path: Path, frames: np.ndarray, rate: int = 10, codec: str = "libx264") -> Path:
    """Encode frames with PyAV, which the caller has asked for."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
