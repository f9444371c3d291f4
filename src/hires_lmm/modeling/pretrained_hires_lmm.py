"""What the two models share: loading, saving, and what transformers and its companions may do with them."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .compat_hires_lmm import CACHE_NAMES
from .configuration_hires_lmm import HiResLmmConfig
from .loading_hires_lmm import HiResLmmLoadingMixin


PEFT_EMBEDDINGS = "embeddings.word_embeddings"


class HiResLmmPreTrainedModel(HiResLmmLoadingMixin, PreTrainedModel):
    """Base of the two models: loading, saving and what the library may do with them."""

    config: HiResLmmConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: Any = None
    _skip_keys_device_placement = [*CACHE_NAMES]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    on_saved: Any = None  # called with model and folder after saving; the package writes the card there

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """See `PreTrainedModel.save_pretrained`."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process and self.on_saved is not None:
            self.on_saved(save_directory)

    def post_init(self) -> None:
        """Finish construction; keep only block classes that exist, since FSDP rejects the others."""
        super().post_init()
        for tower in getattr(self, "extra_towers", {}).values():  # the library looks at children alone
            self._no_split_modules = {*self._no_split_modules, *(tower._no_split_modules or ())}
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in present}

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and in towers of timm, which have a switch of their own."""
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        for module in self.modules():
            if hasattr(module, "timm_model") and module.supports_gradient_checkpointing:
                module.timm_model.set_grad_checkpointing(enable)

    def get_submodule(self, target: str) -> nn.Module:
        """A module by its path; under the name that PEFT's prompt tuning asks for, the word embeddings.

        It would take the first table of as many rows as the vocabulary, which may be that of a part.
        """
        return self.get_input_embeddings() if target == PEFT_EMBEDDINGS else super().get_submodule(target)

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        embeddings = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.base_model.connector.resize_vocabulary(embeddings.num_embeddings, mean_resizing)
        return embeddings
