"""Loading that refuses what does not fit: no model starts with random weights unnoticed."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from os import getpid
from threading import RLock
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from .configuration_hires_lmm import check_dtype
from .own_parts_hires_lmm import HUB_OPTIONS, collect_files


LOCKS: dict[int, Any] = {}  # by process: a lock that was held while a process forked stays locked in the copy
SOURCE: ContextVar[dict[str, Any] | None] = ContextVar("SOURCE", default=None)  # what is loaded: see `load_parts`
SHOWN_NAMES = 5
PEFT_MARKS = ("lora_", "base_layer", "modules_to_save", "original_module")


class HiResLmmCheckpointError(ValueError, RuntimeError):
    """Tensors do not fit the model; a `RuntimeError` too, which torch and transformers raise for that."""


class HiResLmmLoadingMixin:
    """`from_pretrained` that fails where transformers warns and fills the gap with random weights."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        config.load_parts(**(SOURCE.get() or {}))
        model: Any = super()
        model.__init__(config, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; a part that cannot be saved is refused before anything is written."""
        model: Any = self
        collect_files(model.config.part_names(), save_directory)
        saver: Any = super()
        saver.save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint; see `PreTrainedModel.from_pretrained`.

        Threads load one after another: transformers swaps functions of its classes meanwhile, and two loads at once
        would leave a stand-in there, after which no head is tied to its word embeddings. A user's own parts are read
        from the checkpoint with `trust_remote_code=True`.

        Args:
            pretrained_model_name_or_path (`str`): Folder or Hub id, of a model or of an adapter for one; None with an
                empty `state_dict` makes a new model.
            model_args, kwargs: As in transformers.
            ignore_mismatched_sizes (`bool`): Start tensors anew whose shape in the checkpoint differs.
            output_loading_info (`bool`): Return the lists too; what is missing or superfluous is then no error.

        Raises:
            HiResLmmCheckpointError: If tensors are missing, superfluous, of another shape or without values.
            ValueError: If `dtype` names no floating-point format, or a part is neither trusted nor imported.
        """
        for name in ("dtype", "torch_dtype"):
            if kwargs.get(name) != "auto":
                check_dtype(kwargs.get(name), name)
        loader: Any = super()
        hub = {name: kwargs[name] for name in ("trust_remote_code", *HUB_OPTIONS) if name in kwargs}
        with LOCKS.setdefault(getpid(), RLock()), _loading({"source": pretrained_model_name_or_path, **hub}):
            model, info = loader.from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                ignore_mismatched_sizes=True,  # the error below names the tensors, that of transformers does not
                output_loading_info=True,
                **kwargs,
            )
        is_new = pretrained_model_name_or_path is None and not kwargs.get("state_dict")
        for found in (model.__dict__.pop("_weights_info", info), info):
            shapes = [] if ignore_mismatched_sizes else found.get("mismatched_keys", ())
            _check(model, {} if output_loading_info or is_new else found, shapes)
        bare = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if bare and not is_fsdp_enabled() and not hasattr(model, "hf_device_map"):
            raise HiResLmmCheckpointError(
                f"After loading, tensors of {type(model).__name__} have no values: {_shorten(sorted(bare))}. Load "
                "outside of torch.device('meta') and init_empty_weights()."
            )
        return (model, info) if output_loading_info else model

    def initialize_weights(self) -> None:
        """Let each half start its own weights by its own rules, then start the rest.

        In custom code transformers passes over modules without parameters of their own, also in its own towers, whose
        rules stand on such modules.
        """
        model: Any = self
        for child in model.children():
            if isinstance(child, PreTrainedModel):
                child.initialize_weights()
        loader: Any = super()
        loader.initialize_weights()

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """Keep the lists of the model's own weights: where an adapter follows, transformers returns those of that."""
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        model._weights_info = loading_info.to_dict()
        return loading_info


@contextmanager
def _loading(source: dict[str, Any]) -> Iterator[None]:
    before = SOURCE.set(source)
    try:
        yield
    finally:
        SOURCE.reset(before)


def _check(model: PreTrainedModel, report: dict, mismatched: Any) -> None:
    """Raise if anything is missing, superfluous or of another shape."""
    missing, extra = sorted(report.get("missing_keys", ())), sorted(report.get("unexpected_keys", ()))
    shapes = [
        f"{name} ({tuple(found)} in the checkpoint, {tuple(wanted)} in the model)"
        for name, found, wanted in sorted(mismatched, key=lambda entry: entry[0])
    ]
    lists = (("missing", missing), ("not part of the model", extra), ("of another shape", shapes))
    faults = "; ".join(f"{title}: {_shorten(names)}" for title, names in lists if names)
    if faults:
        source = model.name_or_path
        where = "The given state_dict" if source in ("", "None") else repr(source)
        raise HiResLmmCheckpointError(
            f"{where} does not fit {type(model).__name__}. Tensors {faults}. {_remedy(missing, extra)} To keep what "
            "fits and start the rest anew on purpose, ask for the list with output_loading_info=True, for shapes with "
            "ignore_mismatched_sizes=True."
        )


def _shorten(names: list[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _remedy(missing: list[str], extra: list[str]) -> str:
    """What the names say about how the checkpoint came about."""
    if any(mark in name for name in extra for mark in PEFT_MARKS):
        return "PEFT wraps this model: save its adapter alone and load that, or save merge_and_unload()."
    for prefix in {name[: -len(missing[0])] for name in extra if missing and name.endswith("." + missing[0])}:
        pattern = {f"^{prefix}".replace(".", "[.]"): ""}
        return (
            f"Every name begins with {prefix!r}: save the model without its wrapper, or pass key_mapping={pattern!r}."
        )
    if missing == ["lm_head.weight"] and not extra:
        return "It was saved without its head: load it with AutoModel, or save HiResLmmForConditionalGeneration."
    return "Save it again whole, or load it with the configuration that it was trained with."
