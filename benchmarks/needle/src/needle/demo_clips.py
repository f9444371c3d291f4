"""Draw and encode the four clips of the demonstration, three seconds each, with their questions and answers.

    python -m needle.demo_clips             writes examples/videos/needle_clip_*.mp4 and needle_clips.json

They are clips of the needle task with another seed than those that models are trained and scored on: H.264 in MP4,
which PyAV reads wherever it is installed, and a browser too. No single frame answers a question.
"""

import json
import sys
from pathlib import Path

import av
import numpy as np

from .clips import CLIP_KINDS, needle_clip, render_clip


FOLDER = Path(__file__).parents[4] / "examples" / "videos"
LIST = "needle_clips.json"
SEED, SIZE, NUM_FRAMES, FPS = 2033, 384, 24, 8


def clip_frames(index: int) -> np.ndarray:
    """The frames of a clip of the list, before they are encoded."""
    return render_clip(needle_clip(index, "validation", SEED, NUM_FRAMES, SIZE))


def pick_clips() -> list[dict]:
    """One clip of each kind: file, number, kind, and its questions with their answers."""
    entries = []
    for index, kind in enumerate(CLIP_KINDS):
        asked = needle_clip(index, "validation", SEED, NUM_FRAMES, SIZE).questions
        questions = [{"question": question.text, "answer": question.answer} for question in asked]
        entries.append({"video": f"needle_clip_{kind}.mp4", "clip": index, "kind": kind, "questions": questions})
    return entries


def write_clip(frames: np.ndarray, file: Path) -> None:
    """Encode frames (T, H, W, 3), uint8; with one thread, so that the bytes are the same again."""
    with av.open(str(file), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("h264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"crf": "26", "threads": "1", "preset": "slow"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    """Write clips and list."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    entries = pick_clips()
    for entry in entries:
        write_clip(clip_frames(entry["clip"]), folder / entry["video"])
    (folder / LIST).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
