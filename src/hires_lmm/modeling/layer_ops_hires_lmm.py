"""The driver of layer ops: it calls them behind their layers and lets visual tokens leave the language model there.

All that belongs to one call travels in the keyword `layer_call` of the language model; hooks know a number alone.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from .bases_hires_lmm import LayerCall, TowerCall
from .carriers_hires_lmm import ImageGeometry, VisualTokens, drop
from .compat_hires_lmm import (
    CACHE,
    attention_of,
    attention_window,
    feed_forward_of,
    layers_of,
    runs_twice_without_graph,
)
from .conversation_hires_lmm import Conversation
from .layer_attention_hires_lmm import (
    QUERIES,
    KeyNote,
    LayerAttention,
    give_queries,
    shown_columns,
    take,
    take_ids,
    visible,
)
from .layer_record_hires_lmm import Keys, LayerRecord
from .packing_hires_lmm import Packing, expand, pack, plan_packing
from .question_hires_lmm import PromptText


LAYER_CALL = "layer_call"
LAYER_OPTIONS = "layer_options"
RECORD = "layer_ops"
RUNNING: ContextVar[Any] = ContextVar("hires_lmm_layer_call", default=None)  # feed-forwards get no keywords
# B = rows, n = positions of the call, m = those that are still there, K = keys of a layer. A slot is the place of a
# token in the conversation, counted before anything left a layer.


@dataclass(eq=False)
class Level:
    """The positions of a call that are still there, from one layer on.

    Args:
        stay (`torch.Tensor` of shape `(B, n)`): True for them.
        plan (`Packing`, *optional*): Them, packed; None while nothing has left.
        is_packed (`bool`): Whether the others have left the hidden states too.
        is_plain (`bool`): Known to be without padding.
        weight (`torch.Tensor` of shape `(B, n)`, *optional*): Soft mask of keys, in training.
        made (`dict`): What was computed for it.
    """

    stay: torch.Tensor
    plan: Packing | None = None
    is_packed: bool = False
    is_plain: bool = True
    weight: torch.Tensor | None = None
    made: dict = field(default_factory=dict)

    @property
    def real(self) -> torch.Tensor:
        """True in the hidden states for what is still there."""
        return self.plan.mask if self.is_packed else self.stay  # type: ignore[union-attr]

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """Of `(B, n)` values of the call, those of the hidden states."""
        return values.gather(1, self.plan.index) if self.is_packed else values  # type: ignore[union-attr]

    def put(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the hidden states, for the positions of the call."""
        return values.gather(1, self.plan.expand) if self.is_packed else values  # type: ignore[union-attr]


@dataclass
class Placed:
    """Where the visual tokens of a call stand.

    Args:
        visual (`torch.Tensor` of shape `(B, n)`): True for them.
        last (`torch.Tensor` of shape `(B,)`): Position of the last token of the prompt.
        token (`torch.Tensor` of shape `(B, n)`): Row of each in `tokens`; -1 elsewhere, and where it is not known.
        tokens (`VisualTokens`, *optional*): The tokens with their geometry.
        has_visual (`bool`): Whether the call holds images.
    """

    visual: torch.Tensor
    last: torch.Tensor
    token: torch.Tensor
    tokens: VisualTokens | None = None
    has_visual: bool = True

    def pack(self, packing: Packing) -> "Placed":
        """The same behind the splice, where tokens were dropped."""
        visual = self.visual.gather(1, packing.index) & packing.mask
        token = torch.where(visual, self.token.gather(1, packing.index), -1)
        return Placed(visual, packing.expand.gather(1, self.last[:, None])[:, 0], token, self.tokens, self.has_visual)


class LanguageCall:
    """One call of the language model; its hooks, and nothing else, write to it.

    Args:
        ops (`list[HiResLmmLayerOp]`): All of the language model.
        conversation (`Conversation`): What is remembered; None where there is nothing that could leave or has left.
        attention_mask (`torch.Tensor`, *optional*): As the language model gets it.
        placed (`Placed`): Visual tokens.
        can_pack (`bool`): False: tokens that leave are hidden by masks and stay where they are.
        options (`dict[str, Any]`): What the caller says to layer ops.
    """

    def __init__(
        self,
        ops: list,
        config: Any,
        conversation: Conversation | None,
        attention_mask: Any,
        placed: Placed,
        can_pack: bool,
        training: bool,
        options: dict,
    ):
        self.ops = {layer: [op for op in ops if layer in op.layers] for layer in range(config.num_hidden_layers)}
        self.first = next(layer for layer, own in self.ops.items() if own)
        self.config, self.placed, self.can_pack, self.training = config, placed, can_pack, training
        self.options = options
        self.conversation = conversation
        rows, count = placed.visual.shape
        self.past = 0 if conversation is None else conversation.length
        valid, prefix = torch.ones_like(placed.visual), placed.visual.new_ones(rows, self.past)
        is_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if is_mask:
            valid, prefix = attention_mask[:, -count:].bool(), attention_mask[:, : self.past].bool()
        self.slots = (torch.arange(count, device=valid.device) + self.past).expand(rows, -1)
        self.record: LayerRecord | None = None
        if conversation is not None:
            found: Any = conversation.records.get(RECORD)
            if found is None and attention_mask is not None and not is_mask:
                raise ValueError("Layer ops need a two-dimensional attention_mask; pass (batch, length).")
            if found is None:
                slots = torch.where(prefix, torch.arange(self.past, device=valid.device), -1)
                keys = [Keys(slots, not is_mask or not self.past)] * config.num_hidden_layers
                found = LayerRecord(keys, self.past, torch.zeros_like(prefix))
            self.record = found
            self.visual = torch.cat([found.visual, placed.visual], dim=1)
        self.levels = {self.first: Level(valid, is_plain=not is_mask)}
        self.extended: dict[int, Keys] = {}
        self.made: dict[tuple, Any] = {}
        self.attentions: dict[int, LayerAttention] = {}
        self.feeds: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.left_at = torch.full_like(placed.token, -1)
        self.aux: dict[str, torch.Tensor] = {}

    def level(self, layer: int) -> Level:
        """What enters a layer; before the first with ops nothing has left."""
        return self.levels[max((start for start in self.levels if start <= layer), default=self.first)]

    def keys(self, layer: int) -> Keys:
        """The keys of a layer with those of this call."""
        old, level = self.record.keys[layer], self.level(layer)  # type: ignore[union-attr]
        if ("keys", id(old), id(level)) not in self.made:
            slots = torch.cat([old.slots, torch.where(level.real, level.take(self.slots), -1)], dim=1)
            new = Keys(slots, old.is_plain and level.is_plain, old.is_whole and level.plan is None)
            self.made["keys", id(old), id(level)] = new
        self.extended[layer] = self.made["keys", id(old), id(level)]
        return self.extended[layer]

    def enter(self, layer: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before a layer: masks and positions of what is still there."""
        if self.record is None or layer < self.first:
            return None
        level, keys = self.level(layer), self.keys(layer)
        hidden = args[0] if args else kwargs["hidden_states"]
        masking = [op for op in self.ops[layer] if op.masks_attention] if self.placed.has_visual else []
        if level.plan is None and level.weight is None and keys.is_whole and not masking:
            return None
        kwargs = {**kwargs, "attention_mask": self.mask(layer, level, keys, kwargs.get(CACHE), hidden, masking)}
        if level.is_packed:
            index = level.plan.index  # type: ignore[union-attr]
            if kwargs.get("position_embeddings") is not None:
                kwargs["position_embeddings"] = tuple(
                    self.once(level, part, lambda part: take(part, index)) for part in kwargs["position_embeddings"]
                )
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = self.once(level, kwargs["position_ids"], lambda ids: take_ids(ids, index))
        return args, kwargs

    def once(self, level: Level, value: torch.Tensor, function: Callable) -> torch.Tensor:
        """What a function makes of a tensor that several layers get, computed once."""
        if id(value) not in level.made:
            level.made[id(value)] = value, function(value)
        return level.made[id(value)][1]

    def mask(
        self, layer: int, level: Level, keys: Keys, cache: Any, hidden: torch.Tensor, masking: list
    ) -> torch.Tensor | None:
        """The mask of a layer, in the form that its attention function reads, as its ops change it."""
        count, total = hidden.shape[1], keys.slots.shape[1]
        length, offset = (total, 0) if cache is None else cache.get_mask_sizes(count, layer)
        window, kind = attention_window(self.config, layer), self.config._attn_implementation
        fits = window is None or self.past + self.slots.shape[1] <= window  # in slots: what left still keeps its room
        is_causal = (count == 1 or (count == total and kind != "eager")) and not masking
        if keys.is_plain and level.weight is None and fits and is_causal and length == total:
            return None
        form = ("mask", id(keys), id(level), window, length, offset, layer if masking else None)
        if form in self.made:
            return self.made[form]
        columns = shown_columns(keys.slots, length, offset)
        if "flash" in kind:
            if not fits or level.weight is not None or masking:
                raise ValueError("flash attention cannot hide tokens like that; load the model with sdpa.")
            return self.made.setdefault(form, (columns >= 0).long())
        check_attention(kind)
        slots = level.take(self.slots)
        own = (torch.arange(count, device=slots.device) + (total - count - offset)).expand_as(slots)
        seen = visible(slots, own, columns, window)[:, None]
        for op in masking:
            start = total - count - offset
            part = op.see(layer, seen[..., start : start + count], self.view(layer, level, hidden.device))
            sides = [
                side.expand(-1, part.shape[1], -1, -1) for side in (seen[..., :start], seen[..., start + count :])
            ]
            seen = torch.cat([sides[0], part, sides[1]], dim=-1)
        if level.weight is None and kind == "sdpa":
            return self.made.setdefault(form, seen)
        mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
        if level.weight is not None:
            bias = level.take(level.weight).clamp(min=torch.finfo(hidden.dtype).tiny).log().to(hidden.dtype)
            mask = mask + nn.functional.pad(bias, (length - count, 0))[:, None, None]
        mask = mask.masked_fill(~seen, torch.finfo(hidden.dtype).min)
        return mask if level.weight is not None else self.made.setdefault(form, mask)

    def attend(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before the attention of a layer that an op reads: note its inputs and, once it has them, its keys."""
        if self.record is None:
            return args, kwargs
        inputs = {**kwargs, **({"hidden_states": args[0]} if args else {})}
        count = inputs["hidden_states"].shape[1]
        level, cache = self.level(layer), kwargs.get(CACHE)
        slots = level.take(self.slots)
        columns = self.keys(layer).slots
        total = columns.shape[1]
        length, offset = (total, 0) if cache is None else cache.get_mask_sizes(count, layer)
        columns = shown_columns(columns, length, offset)
        start, window = total - count - offset, attention_window(self.config, layer)

        visual = self.visual.gather(1, columns.clamp(min=0)) & (columns >= 0)

        def note(keys: torch.Tensor, values: torch.Tensor) -> None:
            here = (part.to(keys.device) for part in (slots, columns, visual))
            at, shown, seen = here
            self.attentions[layer] = LayerAttention(module, inputs, keys, values, at, shown, start, window, seen)

        return args, {**kwargs, CACHE: KeyNote(cache, note)}

    def attended(self, layer: int, module: Any, output: Any) -> Any:
        """Behind the attention of a layer: what its ops put in place of it."""
        for op in self.ops[layer] if self.record is not None else ():
            hidden = output[0]
            made = (
                op.attend(layer, self.view(layer, self.level(layer), hidden.device)) if op.changes_attention else None
            )
            if made is not None:
                output = (module.o_proj(made.transpose(1, 2).flatten(2)), *output[1:])
        return output

    def split_feed(self, layer: int, hidden: torch.Tensor) -> tuple | None:
        """Before the feed-forward of a layer: visual tokens stay outside."""
        if not self.placed.has_visual:
            return None
        visual = self.view(layer, self.level(layer), hidden.device).visual
        self.feeds[layer] = visual, hidden
        return (hidden[~visual][None],)

    def join_feed(self, layer: int, module: Any, output: torch.Tensor) -> torch.Tensor:
        """Behind it: visual tokens come back, from the op that splits."""
        if layer not in self.feeds:
            return output
        visual, hidden = self.feeds.pop(layer)
        part = next(op for op in self.ops[layer] if op.splits_feed).feed(layer, module, hidden[visual])
        joined = output.new_zeros(hidden.shape).masked_scatter(~visual[..., None], output)
        return joined.masked_scatter(visual[..., None], part.to(output.dtype))

    def leave(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Behind a layer: run its ops, and pack what stays."""
        level = self.level(layer)
        for op in self.ops[layer]:
            call = self.view(layer, level, hidden.device)
            hidden, keep = run_op(op, layer, hidden, call)
            if keep is not None and self.record is not None:
                hidden, level = self.narrow(layer, level, hidden, keep, call)
        self.levels[layer + 1] = level
        self.attentions.pop(layer, None)
        return hidden

    def view(self, layer: int, level: Level, device: torch.device) -> LayerCall:
        """What an op sees of the call, where the layer is."""
        placed, last = self.placed, self.placed.last
        if level.is_packed:
            last = level.plan.expand.gather(1, last[:, None])[:, 0]  # type: ignore[union-attr]
        return LayerCall(
            slots=level.take(self.slots).to(device),
            real=level.real.to(device),
            visual=(level.take(placed.visual) & level.real).to(device),
            last=last.to(device),
            token=level.take(placed.token).to(device),
            tokens=placed.tokens,
            attention=self.attentions.get(layer),
            is_prefill=placed.has_visual,
            training=self.training,
            aux=self.aux,
            options=self.options,
        )

    def narrow(
        self, layer: int, level: Level, hidden: torch.Tensor, keep: torch.Tensor, call: LayerCall
    ) -> tuple[torch.Tensor, Level]:
        """Let visual tokens leave, or weigh them as keys."""
        if keep.is_floating_point():
            if not self.training:
                raise ValueError("A layer op returned a soft mask outside of training; return one of bool there.")
            weight = level.put(torch.where(call.visual, keep, 1.0).to(level.stay.device))
            weight = weight if level.weight is None else weight * level.weight
            return hidden, Level(level.stay, level.plan, level.is_packed, level.is_plain, weight)
        stay = level.stay & ~level.put((call.visual & ~keep).to(level.stay.device))
        self.left_at = torch.where(level.stay & ~stay, layer, self.left_at)
        plan = plan_packing(stay, "left")
        if not self.can_pack:
            return hidden, Level(stay, plan, False, False, level.weight)
        index = level.put(torch.arange(hidden.shape[1], device=stay.device).expand(len(hidden), -1))
        hidden = take(hidden, index.gather(1, plan.index).to(hidden.device))
        return hidden, Level(stay, plan, True, bool(plan.mask.all()), level.weight)

    def remember(self, cache: Any, outputs: dict) -> None:
        """Note what the layers hold now, and in the outputs what ops said and where tokens left."""
        record, count, depth = self.record, self.slots.shape[1], self.config.num_hidden_layers
        if record is not None and self.conversation is not None and cache is not None:
            record.keys = [self.extended.get(layer, keys) for layer, keys in enumerate(record.keys)]
            record.total, record.visual = self.past + count, self.visual
            if self.level(depth).plan is not None:
                record.decided = self.past + int(self.placed.last.max()) + 1
            self.conversation.records[RECORD] = record
        if self.aux:
            outputs["aux"] = {**outputs.get("aux", {}), **self.aux}
        if outputs.get("token_map") is not None:
            known = self.placed.token >= 0
            outputs["token_map"].left_at[self.placed.token[known].cpu()] = self.left_at[known].cpu()

    def expand(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last hidden states at the call's length: what left shows the last one before it that stayed."""
        level = self.level(self.config.num_hidden_layers)
        if level.plan is None:
            return hidden
        return expand(hidden if level.is_packed else pack(hidden, level.plan), level.plan)


@dataclass
class TowerPass:
    """One pass of whole images through the vision tower, for its layer ops.

    Args:
        ops (`list[HiResLmmLayerOp]`): All of the tower.
        images (`list[ImageGeometry]`): The images, in the order of the views.
        grid (`tuple[int, int]`): Patch rows and columns of a view.
    """

    ops: list
    images: list[ImageGeometry]
    grid: tuple[int, int]
    training: bool

    def split(self, pixels: torch.Tensor, chunk_size: int | None) -> list[tuple[torch.Tensor, dict]]:
        """Cut views `(V, 3, H, W)` between images: at most so many, but one image at least; each with its call."""
        pieces: list[list[ImageGeometry]] = [[]]
        for image in self.images:
            count = sum(len(other.views) for other in [*pieces[-1], image])
            if chunk_size is not None and pieces[-1] and count > chunk_size:
                pieces.append([])
            start = sum(len(other.views) for other in pieces[-1])
            pieces[-1].append(replace(image, first_view=start))
        lengths = [sum(len(image.views) for image in piece) for piece in pieces]
        calls = [{LAYER_CALL: replace(self, images=piece)} for piece in pieces]
        return list(zip(pixels.split(lengths), calls, strict=True))

    def leave(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Behind a layer: run its ops."""
        call = TowerCall(self.images, self.grid, hidden.shape[1] - self.grid[0] * self.grid[1], self.training)
        for op in (op for op in self.ops if layer in op.layers):
            hidden, keep = run_op(op, layer, hidden, call)
            if keep is not None:
                raise ValueError("No patch leaves the vision tower; a layer op of it returns None beside the states.")
        return hidden


def check_attention(kind: str | None) -> None:
    """Refuse attention functions whose masks are not known; a server's own, as of vLLM, among them."""
    if kind is not None and kind not in ("eager", "sdpa") and "flash" not in kind:
        raise ValueError(f"Layer ops need eager, sdpa or flash attention, and this model has {kind!r}.")


def ops_of(model: Any, where: str) -> list:
    """The layer ops of a `HiResLmmModel` that run in `language_model` or `vision_tower`."""
    return [op for op in model.connector.layer_ops if op.options.of == where]


def open_tower(model: Any, images: list[ImageGeometry], used: tuple[int, ...]) -> TowerPass | None:
    """The call of the vision tower for its layer ops; None where it has none."""
    ops = ops_of(model, "vision_tower")
    if not ops:
        return None
    rows = set(used)
    seen = [
        replace(image, views=tuple(view for row, view in enumerate(image.views, image.first_view) if row in rows))
        for image in images
    ]
    return TowerPass(ops, [image for image in seen if image.views], model.config.patch_grid, model.training)


def check_answer(op: Any, answer: Any, shape: torch.Size) -> Any:
    """What an op returned, if it is hidden states of the shape that came and, beside it, None or a mask."""
    name = type(op).__name__
    if not isinstance(answer, tuple) or len(answer) != 2 or getattr(answer[0], "shape", None) != shape:
        raise ValueError(f"{name} must return hidden states of shape {tuple(shape)} and which tokens stay, or None.")
    keep = answer[1]
    is_mask = isinstance(keep, torch.Tensor) and (keep.dtype == torch.bool or keep.is_floating_point())
    if keep is not None and not (is_mask and keep.shape == shape[:2]):
        raise ValueError(
            f"{name} must say which tokens stay by bool of shape {tuple(shape[:2])} (or floats), or None."
        )
    return answer


def run_op(op: Any, layer: int, hidden: torch.Tensor, call: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run an op; in training each of its parameters gets a gradient, on every process."""
    hidden, keep = check_answer(op, op(layer, hidden, call), hidden.shape)
    learned = [part for part in op.parameters() if part.requires_grad] if call.training else []
    for part in learned:
        hidden = hidden + 0.0 * part.reshape(-1)[0].to(hidden)
    return hidden, keep


def enter_layer(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Hook before every layer of the language model."""
    call = kwargs.get(LAYER_CALL)
    return None if call is None else call.enter(layer, args, kwargs)


def enter_attention(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Hook before the attention of layers that an op reads."""
    call = kwargs.get(LAYER_CALL)
    RUNNING.set(call)
    return None if call is None else call.attend(layer, module, args, kwargs)


def leave_attention(layer: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Hook behind the attention of layers that an op changes."""
    call = kwargs.get(LAYER_CALL)
    return output if call is None else call.attended(layer, module, output)


def enter_feed(layer: int, module: nn.Module, args: tuple) -> tuple | None:
    """Hook before the feed-forward of layers where an op splits it."""
    call = RUNNING.get()
    return None if call is None else call.split_feed(layer, args[0])


def leave_feed(layer: int, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Hook behind it."""
    call = RUNNING.get()
    RUNNING.set(None)
    return output if call is None else call.join_feed(layer, module, output)


def leave_layer(layer: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Hook behind every layer with ops."""
    call = kwargs.get(LAYER_CALL)
    if call is None:
        return output
    if isinstance(output, tuple):
        return call.leave(layer, output[0]), *output[1:]
    return call.leave(layer, output)


def install_layer_ops(model: Any) -> None:
    """Hang hooks on the layers that ops run behind, and on those where tokens may be missing then.

    They come before those by which the library notes hidden states, which it hangs up in the first call.
    """
    model.layer_hooks = hooks = []
    inside = ops_of(model, "vision_tower")
    for number, layer in enumerate(layers_of(model.vision_tower) if inside else ()):
        if any(number in op.layers for op in inside):
            hooks.append(layer.register_forward_hook(partial(leave_layer, number), with_kwargs=True, prepend=True))
    ops = ops_of(model, "language_model")
    if not ops:
        return
    config = model.config.text_config
    check_attention(config._attn_implementation)
    AttentionInterface.register(QUERIES, give_queries)
    for number, layer in enumerate(layers_of(model.language_model)):
        attention_window(config, number)
        hooks.append(layer.register_forward_pre_hook(partial(enter_layer, number), with_kwargs=True))
        own = [op for op in ops if number in op.layers]
        if own:
            hooks.append(layer.register_forward_hook(partial(leave_layer, number), with_kwargs=True, prepend=True))
        if any(op.reads_attention for op in own):
            before = partial(enter_attention, number)
            hooks.append(attention_of(layer).register_forward_pre_hook(before, with_kwargs=True))
        if any(op.changes_attention for op in own):
            behind = partial(leave_attention, number)
            hooks.append(attention_of(layer).register_forward_hook(behind, with_kwargs=True, prepend=True))
        if any(op.splits_feed for op in own):
            feed = feed_forward_of(layer)
            hooks.append(feed.register_forward_pre_hook(partial(enter_feed, number)))
            hooks.append(feed.register_forward_hook(partial(leave_feed, number)))


def place(text: PromptText, placeholder: torch.Tensor, tokens: VisualTokens | None, num_drafted: int | None) -> Placed:
    """Where visual tokens stand in a prompt, and where the prompt ends.

    It ends before the first answer behind the first image of a row: labels say where that is, else the prompt mask;
    in `generate`, before what was drafted.
    """
    length = placeholder.shape[1]
    positions = torch.arange(length, device=placeholder.device)
    prompt = torch.ones_like(placeholder)
    if isinstance(text.attention_mask, torch.Tensor) and text.attention_mask.ndim == 2:
        prompt = text.attention_mask[:, -length:].bool()
    behind = placeholder.cumsum(dim=1) > 0
    if num_drafted is not None:
        prompt = prompt & (positions < length - num_drafted)
    elif text.labels is not None:
        prompt = prompt & (((text.labels != -100) & behind).cumsum(dim=1) == 0)
    elif text.prompt_mask is not None and text.prompt_mask.shape == placeholder.shape:
        asked = text.prompt_mask.bool()
        answered = ~asked & ~placeholder & ((asked & behind).cumsum(dim=1) > 0)
        prompt = prompt & (answered.cumsum(dim=1) == 0)
    token = torch.full_like(placeholder, -1, dtype=torch.long)
    if tokens is not None:
        numbers = torch.arange(len(tokens.features), device=token.device)[:, None]
        token = token.masked_scatter(placeholder, drop(replace(tokens, features=numbers))[0])
    return Placed(placeholder, torch.where(prompt, positions, -1).amax(dim=1).clamp(min=0), token, tokens)


def open_layers(model: Any, prompt: Any, cache: Any, options: dict) -> LanguageCall | None:
    """The call of the language model for its layer ops, written into `options`; None where the model has none."""
    told = options.pop(LAYER_OPTIONS, None) or {}
    ops = ops_of(model, "language_model")
    known = [name for op in ops for name in op.reads_options]
    if unknown := [name for name in told if name not in known]:
        raise ValueError(f"No layer op reads {unknown[0]!r} of layer_options; they read {known or 'nothing'}.")
    if not ops:
        return None
    config, placed, conversation = model.language_model.config, prompt.placed, prompt.conversation
    check_attention(config._attn_implementation)  # it may have been set since
    learns = model.training and any(part.requires_grad for op in ops for part in op.parameters())
    if learns and runs_twice_without_graph(model.language_model):
        raise ValueError(
            "A layer op learns, and what it says of a layer gets no gradient under reentrant checkpointing; pass "
            "use_reentrant=False, the default."
        )
    if placed is None:
        nowhere = torch.zeros(prompt.embeds.shape[:2], dtype=torch.bool, device=prompt.embeds.device)
        conversation = conversation if RECORD in conversation.records else None
        placed = Placed(nowhere, nowhere.sum(1) + nowhere.shape[1] - 1, nowhere.long() - 1, has_visual=False)
    elif prompt.packing is not None:
        placed = placed.pack(prompt.packing)
    shown = [
        getattr(config, name) if options.get(name) is None else options[name]
        for name in ("output_hidden_states", "output_attentions")
    ]
    can_pack = not any(shown)
    call = LanguageCall(ops, config, conversation, prompt.attention_mask, placed, can_pack, model.training, told)
    options[LAYER_CALL] = call
    return call
