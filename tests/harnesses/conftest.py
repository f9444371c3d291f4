"""Tests that need lmms-eval and VLMEvalKit: `make test-harnesses`, or skipped by name where they are not installed."""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))  # for `import needle_tasks`, here and in processes that tests start
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OPENAI_API_KEY="none", TOKENIZERS_PARALLELISM="false")
