"""Write the settings by which `hires-lmm tokens PRESET` counts without torch, after a preset was added or changed.

python scripts/preset_settings.py
"""

import json
from pathlib import Path

from hires_lmm import PRESETS
from hires_lmm.conversion import preset_processor


FILE = Path(__file__).parents[1] / "src" / "hires_lmm" / "preset_settings.json"
NAMES = (
    "planner",
    "video_planner",
    "num_frames",
    "view_size",
    "patch_size",
    "max_crops",
    "pinpoints",
    "unpad",
    "global_view",
    "views",
    "token_layout",
)


def settings_of(preset: str) -> dict:
    """What counts, of the image processor of a preset, as JSON values."""
    saved = preset_processor(preset).image_processor.to_dict()
    layout = {name: value for name, value in saved["token_layout"].items() if value is not None}
    settings = {name: saved.get(name) for name in NAMES} | {"token_layout": layout}
    return json.loads(json.dumps({name: value for name, value in settings.items() if value is not None}))


if __name__ == "__main__":
    lines = [f'"{preset}": {json.dumps(settings_of(preset))}' for preset in PRESETS]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
