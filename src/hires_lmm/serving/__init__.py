"""Serving: the plugin by which vLLM routes by the question, and the command that starts its server."""

ARCHITECTURE = "HiResLmmForConditionalGeneration"


def register() -> None:
    """Entry point of `vllm.general_plugins`: vLLM imports the model when a checkpoint asks for it."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "hires_lmm.serving.vllm_model:HiResLmmForVllm")
