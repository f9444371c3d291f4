"""Tests that need lmms-eval and VLMEvalKit: `make test-harnesses`, or skipped by name where they are not installed."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path


if find_spec("lmms_eval") or find_spec("vlmeval"):
    sys.path.insert(0, str(Path(__file__).parent))  # for `import needle_tasks`
    os.environ.update(HF_HUB_OFFLINE="1", OPENAI_API_KEY="none", TOKENIZERS_PARALLELISM="false")
