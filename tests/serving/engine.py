"""One vLLM engine in a process of its own: reads a JSON of settings and requests, writes the tokens of each answer.

    python engine.py SPEC.json ANSWERS.json

A request that is refused alone has its error in place of tokens; what fails at load ends the process.
"""

import json
import os
import sys
from pathlib import Path


os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)
SPEC = json.loads(Path(sys.argv[1]).read_text())
if SPEC.get("plain"):  # as where this package is not installed
    os.environ["VLLM_PLUGINS"] = ""
    sys.modules["hires_lmm"] = None


def main() -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    spec = SPEC
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "trust_remote_code": True}
    engine = LLM(spec["checkpoint"], limit_mm_per_prompt={"image": 2}, **{**settings, **spec.get("engine", {})})
    sampling = SamplingParams(temperature=0, max_tokens=spec["max_tokens"], ignore_eos=spec.get("ignore_eos", False))
    lora = spec.get("lora")
    adapter = LoRARequest("adapter", 1, lora) if lora else None

    def prompt(request: dict) -> dict:
        made = {"prompt": request["text"]}
        if request["images"]:
            made["multi_modal_data"] = {"image": [Image.open(path) for path in request["images"]]}
        if request.get("options"):
            made["mm_processor_kwargs"] = request["options"]
        return made

    def ask(requests: list[dict]) -> list[list[int]]:
        answers = engine.generate(
            [prompt(request) for request in requests], sampling, use_tqdm=False, lora_request=adapter
        )
        return [list(answer.outputs[0].token_ids) for answer in answers]

    given = []
    if spec.get("one_by_one"):
        for request in spec["requests"]:
            try:
                given += ask([request])
            except ValueError as error:
                given.append(str(error))
    else:
        given = ask(spec["requests"])
    Path(sys.argv[2]).write_text(json.dumps(given))


if __name__ == "__main__":
    main()
