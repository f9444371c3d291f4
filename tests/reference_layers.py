"""What layer ops must give, written without their driver: one row, no cache, no padding, one explicit mask a layer."""

import functools
import math
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoModel


class MaskedLanguageModel:
    """A language model in which visual tokens that leave behind a layer are seen by none but themselves.

    Args:
        model: A `HiResLmmForConditionalGeneration`; its language model is copied, with eager attention.
        leave: `(layer, candidates, weights, states, last) -> positions that leave` behind that layer, for the visual
            positions `candidates` of one prompt that are still there, the attention `(heads, n, n)` and the hidden
            states `(n, D)` of the layer, and the last position of that prompt.
        prompts: For each prompt of the row its visual positions and its last position.
    """

    def __init__(self, model, leave, prompts):
        config = model.config.text_config
        source = model.model.language_model
        self.plain = AutoModel.from_config(config, attn_implementation="eager").to(source.dtype).eval()
        self.plain.load_state_dict(source.state_dict())
        self.leave, self.prompts, self.change = leave, prompts, lambda layer, seen: seen
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        self.windows = [window if kind == "sliding_attention" else None for kind in kinds]
        getattr(leave, "attach", lambda host: None)(self)
        for number, layer in enumerate(self.plain.layers):
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: setattr(self, "given", (module, kwargs)), with_kwargs=True
            )
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, i=number: self.before(i, args, kwargs), with_kwargs=True
            )
            layer.self_attn.register_forward_hook(lambda module, args, output: setattr(self, "weights", output[1][0]))
            layer.register_forward_hook(lambda module, args, output, i=number: self.behind(i, output))

    def get_input_embeddings(self):
        return self.plain.get_input_embeddings()

    def before(self, layer, args, kwargs):
        positions = torch.arange(len(self.gone))
        seen = (positions[None] <= positions[:, None]) & ~self.gone[None]
        if self.windows[layer]:
            seen &= positions[:, None] - positions[None] < self.windows[layer]
        seen = self.change(layer, seen | torch.eye(len(positions), dtype=torch.bool))
        mask = torch.zeros(seen.shape, dtype=args[0].dtype).masked_fill(~seen, -math.inf)
        return args, {**kwargs, "attention_mask": mask[None, None] if mask.ndim == 2 else mask[None]}

    def behind(self, layer, output):
        for candidates, last in self.prompts:
            there = [position for position in candidates if not self.gone[position]]
            if there and last < len(self.gone):
                for position in self.leave(layer, there, self.weights, output[0], last):
                    self.gone[position] = True
                    self.left_at[position] = layer

    def logits(self):
        """Scores `(heads, n, n)` of the layer that has just run, whoever sees whom: by rotary positions, no cap."""
        module, given = self.given
        cos, sin = (part[0] for part in given["position_embeddings"])
        found = []
        for kind in "qk":
            states = getattr(module, f"{kind}_proj")(given["hidden_states"][0]).unflatten(-1, (-1, module.head_dim))
            states = getattr(module, f"{kind}_norm", nn.Identity())(states).transpose(0, 1)
            low, high = states.chunk(2, dim=-1)
            found.append(states * cos + torch.cat([-high, low], dim=-1) * sin)
        query, key = found
        return query @ key.repeat_interleave(len(query) // len(key), dim=0).transpose(1, 2) * module.scaling

    def __call__(self, inputs_embeds, **kwargs):
        self.gone, self.left_at = torch.zeros(inputs_embeds.shape[1], dtype=torch.bool), {}
        return self.plain(inputs_embeds=inputs_embeds, use_cache=False)


def masked_model(model, leave, prompts):
    """A stand-in for the model in `reference_generation`."""
    language_model = MaskedLanguageModel(model, leave, prompts)
    return SimpleNamespace(
        model=SimpleNamespace(language_model=language_model), lm_head=model.lm_head, config=model.config
    )


def keep_share(layers, share=0.5, number=None):
    """`keep_after`: of the candidates, those with the highest mean attention of the last position stay.

    Outside a window the attention is zero, and the earlier of two equals stays.
    """

    def leave(layer, candidates, weights, states, last):
        if layer not in layers:
            return []
        scores = weights[:, last].mean(0).tolist()
        kept = int(share * len(candidates) + 0.5) if number is None else min(number, len(candidates))
        ranked = sorted(candidates, key=lambda position: -scores[position])
        if 0 < kept < len(ranked):
            gap = scores[ranked[kept - 1]] - scores[ranked[kept]]
            assert gap > 1e-6 or not scores[ranked[kept]], (
                f"a gap of {gap} between kept and dropped: take another seed"
            )
        return ranked[kept:]

    return leave


def exit_by_gates(gate):
    """`dyvte`: all leave as soon as a gate shared by the layers prefers it, by the text between them and the end."""
    first, second, vectors = gate.linear_1.weight, gate.linear_2.weight, gate.layers.weight

    def leave(layer, candidates, weights, states, last):
        mean = states[max(candidates) + 1 : last].mean(0)
        middle = first @ torch.cat([mean, states[last]]) + vectors[layer]
        stay, go = (second @ nn.functional.gelu(middle)).tolist()
        assert abs(go - stay) > 1e-4, f"logits {stay} and {go} are nearly equal: take another seed"
        return candidates if go > stay else []

    return leave


def over_thresholds(op, cells):
    """`atp`: what scores above neither threshold leaves. `cells` as for `prune`."""
    hosts, thresholds = [], dict(zip(op.layers, op.thresholds, strict=True))

    def leave(layer, candidates, weights, states, last):
        if layer not in thresholds:
            return []
        places = [place for visual, _ in hosts[-1].prompts for place in visual]
        logits, text = hosts[-1].logits().mean(0), range(max(candidates) + 1, last + 1)
        own = logits[candidates][:, candidates].mean(0)
        cross = weights.mean(0)[list(text)][:, candidates].mean(0)
        head = thresholds[layer]
        middle = head.middle(torch.stack([own.mean(), cross.mean()])).relu()
        least, least_place = (part(middle).sigmoid().item() for part in (head.redundancy, head.spatial))
        gone = []
        for place, score in zip(candidates, ((own + cross) / 2).tolist(), strict=True):
            cell = cells[places.index(place)]
            fine = [step for step in (2, 3, 4) if cell is not None and cell[2] % step == cell[3] % step == 0]
            spatial = max((1 - 3 / step**2 for step in fine), default=0.0)
            assert min(abs(score - least), abs(spatial - least_place)) > 1e-5, "take another seed"
            gone += [place] if score <= least and spatial <= least_place else []
        return gone

    leave.attach = hosts.append
    return leave


def prune(cells, window, heads, neurons, drop_from):
    """`yopo`: visual tokens see those near them, some heads and neurons do without them, and later all leave.

    `cells` has (turn, view, row, column) of each visual token of all prompts in order, None for separators.
    """

    def leave(layer, candidates, weights, states, last):
        return candidates if layer + 1 == drop_from else []

    def attach(host):
        places = [place for visual, _ in host.prompts for place in visual]

        far = [
            (query, key)
            for query, one in zip(places, cells, strict=True)
            for key, other in zip(places, cells, strict=True)
            if one and other and key < query and one[0] == other[0]
            and (one[1] != other[1] or max(abs(one[2] - other[2]), abs(one[3] - other[3])) > window // 2)
        ]  # fmt: skip
        far = torch.tensor(far, dtype=torch.long).view(-1, 2)

        def is_visual(count):
            return torch.tensor([place in places for place in range(count)])

        def change(layer, seen):
            query, key = far[far[:, 0] < len(seen)].unbind(dim=1)
            seen[query, key] = False
            visual = is_visual(len(seen))
            blind = seen & ~(visual[None] & ~visual[:, None])
            return torch.stack([seen if sees else blind for sees in heads[layer]])

        def silence(module, args, layer):
            states = args[0].unflatten(-1, (len(heads[layer]), -1)).clone()
            for head, sees in enumerate(heads[layer]):
                if not sees:
                    states[:, is_visual(states.shape[1]), head] = 0
            return (states.flatten(-2),)

        def halve(module, args, output):
            visual = is_visual(output.shape[1])
            middle = module.act_fn(module.gate_proj(args[0])) * module.up_proj(args[0])
            middle[..., int(neurons * middle.shape[-1]) :] = 0
            return torch.where(visual[:, None], module.down_proj(middle), output)

        host.change = change
        for number, layer in enumerate(host.plain.layers):
            layer.self_attn.o_proj.register_forward_pre_hook(functools.partial(silence, layer=number))
            layer.mlp.register_forward_hook(halve)

    leave.attach = attach
    return leave


def prompts_of(parts):
    """Visual and last positions of prompts that follow each other, each a list of (is visual, length)."""
    found, start = [], 0
    for part in parts:
        visual = []
        for is_visual, length in part:
            visual += list(range(start, start + length)) if is_visual else []
            start += length
        found.append((visual, start - 1))
    return found


def spans(processor, text, tokens):
    """`(is visual, length)` of the pieces of a prompt."""
    found = []
    for number, piece in enumerate(text.split(processor.image_token)):
        found += [(True, tokens[number - 1])] if number else []
        found.append((False, len(processor.tokenizer(piece, add_special_tokens=False).input_ids)))
    return found


def select_all(tokens, *_):
    return range(len(tokens))
