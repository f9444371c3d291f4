"""Question-fused queries: a small causal transformer reads the image and the question and answers in n tokens."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel
from transformers import initialization as init

from .bases_hires_lmm import HiResLmmTokenOp, PartContext, Traits
from .blocks_hires_lmm import Asked, Block, Prefix, Reading, block_states, cut_cache, read_blocks, stack_prefixes
from .carriers_hires_lmm import Question, VisualTokens
from .compat_hires_lmm import CACHE
from .geometry_hires_lmm import Kind


PROJECTION_STD = 0.001
"""Standard deviation of a new projection to the language model, as released."""

LAYERS_LIMIT = 1000
"""Most layers of the transformer."""


class HiResLmmFusion(HiResLmmTokenOp):
    """Replaces all visual tokens of a conversation by blocks of queries that have read image and question.

    The transformer reads [visual tokens, question 1, queries 1, question 2, queries 2, …] causally; the states of the
    queries, projected, take the place of the placeholders. Block t is the t-th run of placeholders, its question the
    user text behind the run. The last query of a block is the end slot; a short block takes the first rows of the
    table, so that any number up to `num_queries` may be asked for.

    What a call without gradients has read is kept with the cache of the language model (`cache.conversation`): a later
    turn that goes on in it runs its own block only. It holds for the weights it was made with.

    Attributes:
        question (`bool`): Whether questions are read; may be switched on a live model.
        width (`int`): Width of the states.

    In training mode `aux` gets `fusion_slots` `(N, C)`, the states before the projection, and `fusion_blocks` and
    `fusion_rows` `(N,)`, block and conversation of each slot.

    Source: token-space scaling, huggingface.co/papers/2412.18387, and its released code (tenghuilee/
    ScalingCapFusedVisionLM), which counts the end slot among the n queries. Ours: one table of queries apart from the
    word embeddings, the language model's own ids by default, the kept prefix.
    """

    switches = ("question",)  # options that may change in a live model

    @strict
    @dataclass
    class Options:
        """Options of `fusion`.

        Args:
            num_queries (`int`): Slots of the image's turn, n_l; the most that `max_image_tokens` can ask for.
            later_queries (`int`): Slots of later turns, n_s; a smaller n_l lowers it to n_l.
            num_layers, num_heads (`int`): Of the transformer; its width is that of the adapted features.
            intermediate_size (`int`, *optional*): Width of its perceptrons; four times the width by default.
            vocab_size (`int`, *optional*): Rows of its word embeddings; the language model's vocabulary by default.
            question (`bool`): Read the question; without it the queries see the image alone.
            rms_norm_eps, rope_theta (`float`): As in Llama.
        """

        num_queries: int = 256
        later_queries: int = 8
        num_layers: int = 20
        num_heads: int = 16
        intermediate_size: int | None = None
        vocab_size: int | None = None
        question: bool = True
        rms_norm_eps: float = 1e-6
        rope_theta: float | int = 10000.0

        def __post_init__(self) -> None:
            for name in ("num_queries", "later_queries", "num_layers", "num_heads"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
            if self.num_layers > LAYERS_LIMIT:
                raise ValueError(f"num_layers={self.num_layers} is more than {LAYERS_LIMIT}.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        width = context.width
        if width % options.num_heads or width // options.num_heads % 2:
            raise ValueError(
                f"num_heads={options.num_heads} does not cut the width {width} into heads of even size; use another."
            )
        config = LlamaConfig(
            vocab_size=options.vocab_size or context.vocab_size,
            hidden_size=width,
            intermediate_size=options.intermediate_size or 4 * width,
            num_hidden_layers=options.num_layers,
            num_attention_heads=options.num_heads,
            num_key_value_heads=options.num_heads,
            rms_norm_eps=options.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": float(options.rope_theta)},
            pad_token_id=None,
        )
        config._attn_implementation = context.config._attn_implementation
        self.width, self.question = width, options.question
        self.model = LlamaModel(config)
        self.queries = nn.Parameter(torch.empty(options.num_queries, width))
        self.output = nn.Linear(width, context.text_width, bias=False)

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """It makes tokens of its own, in the turn of the image and in later ones, as many as the budget says."""
        return Traits(
            context.grids,
            context.text_width,
            reads_question=options.question,
            count="own",
            own_tokens=options.num_queries,
            later_tokens=options.later_queries,
            budget_on="own",
        )

    def init_weights(self) -> None:
        """Initialise the queries like word embeddings and the projection as released."""
        init.normal_(self.queries, mean=0.0, std=self.model.config.initializer_range)
        init.normal_(self.output.weight, mean=0.0, std=PROJECTION_STD)

    def resize_vocabulary(self, rows: int, mean_resizing: bool = True) -> None:
        """Follow the language model to another number of tokens, unless the options give a vocabulary of its own."""
        if self.options.vocab_size is None:
            self.model.resize_token_embeddings(rows, mean_resizing=mean_resizing)

    def slots(self, num_slots: int) -> torch.Tensor:
        """Rows of a block: the first queries and the end slot, `(num_slots, C)`."""
        return torch.cat([self.queries[: num_slots - 1], self.queries[-1:]])

    def forward(self, tokens: VisualTokens, question: Question | None) -> tuple[VisualTokens, Question | None]:
        """Replace the tokens by one of the language model's width a placeholder; without a question, blank blocks."""
        asked = self._ask(tokens, question)
        conversation = None if question is None else question.conversation
        read = self._read(tokens, asked, keeps=conversation is not None and not torch.is_grad_enabled())
        if conversation is not None:
            for own, (prefix, _) in zip(asked, read, strict=True):
                Reading.of(conversation).note(own.row, prefix, [conversation.length + stop for stop in own.stops])
        slots = torch.cat([tokens.features[:0].to(self.queries), *(states for _, states in read)])
        counts = [sum(block.num_slots for block in own.blocks) for own in asked]
        features = self.output(slots)
        if self.training:  # the word embeddings take part in every loss, also where no question is read
            features = features + (0.0 * self.model.get_input_embeddings().weight[:1]).sum()
        total = len(slots)
        result = replace(
            tokens,
            features=features,
            lengths=counts,
            num_tokens=counts,
            view=torch.full((total,), -1),
            cell=torch.zeros(total, 2, dtype=torch.long),
            kind=torch.full((total,), int(Kind.SEPARATOR)),
            kept=None,
            aux={**tokens.aux, **(_states_by_name(slots, asked) if self.training else {})},
            plan=None,
        )
        return result, question

    def _ask(self, tokens: VisualTokens, question: Question | None) -> list[Asked]:
        """What the call shows of the conversation about each image, and what was read of it before."""
        if question is None or question.placeholder is None:
            counts = (min(count, self.options.num_queries) for count in tokens.num_tokens)
            return [Asked(row, (Block((), count),), [count]) for row, count in enumerate(counts)]
        asked = read_blocks(question, self.question)
        for own, num_tokens in zip(asked, tokens.num_tokens, strict=True):
            is_new = own.blocks[0].num_slots == num_tokens > self.options.later_queries  # the image comes in this turn
            if own.known is None and question.conversation and question.conversation.is_foreign and not is_new:
                raise ValueError(
                    "The conversation goes on in a cache that does not know what was read of its image. Pass the "
                    "cache that this model returned for the turn before (or a copy of it), or the whole conversation "
                    "without cache."
                )
            self._check_runs(own, num_tokens)
        return asked

    def _check_runs(self, own: Asked, num_tokens: int) -> None:
        """Compare the runs of placeholders of one conversation with the blocks that belong there."""
        later = min(num_tokens, self.options.later_queries)
        wanted = [later] * len(own.blocks) if own.earlier else [num_tokens] + [later] * (len(own.blocks) - 1)
        given = [block.num_slots for block in own.blocks]
        if given != wanted or max(given, default=0) > self.options.num_queries:
            raise ValueError(
                f"Conversation {own.row} has runs of {given} image tokens, but fusion makes {wanted} (at most "
                f"{self.options.num_queries} for the image, {self.options.later_queries} for each later turn). Pass "
                "input_ids and the view tensors of one processor call."
            )

    def _read(self, tokens: VisualTokens, asked: list[Asked], keeps: bool) -> list[tuple[Prefix, torch.Tensor]]:
        """Read each conversation to its end: what was read, and the states `(n, C)` of the blocks that are shown."""
        parts, sources = tokens.per_image(tokens.features), tokens.sources or range(len(asked))
        jobs = [(source, own.earlier, own.blocks) for source, own in zip(sources, asked, strict=True)]
        first = [jobs.index(job) for job in jobs]  # beams of one conversation are read once
        todo = sorted(set(first))
        done = dict(zip(todo, self._run([parts[at] for at in todo], [asked[at] for at in todo], keeps), strict=True))
        return [done[at] for at in first]

    def _embed(self, visual: torch.Tensor | None, blocks: tuple[Block, ...]) -> torch.Tensor:
        """Inputs of a conversation `(L, C)`: visual tokens where they are new, then questions and queries."""
        pieces = [] if visual is None else [visual.to(self.queries.dtype)]
        for block in blocks:
            ids = torch.tensor(block.question, dtype=torch.long, device=self.queries.device)
            pieces += [self.model.get_input_embeddings()(ids), self.slots(block.num_slots)]
        return torch.cat(pieces)

    def _run(self, parts: list[torch.Tensor], asked: list[Asked], keeps: bool) -> list[tuple[Prefix, torch.Tensor]]:
        """Run the transformer on what is new of some conversations.

        Known positions are padded in front and masked; new ones are padded behind their end, where no causal reader
        looks. An image that is not the one that was read before is read anew, with all questions.
        """
        if not asked:
            return []
        known = [
            own.known if keeps and own.known and own.known.layers and torch.equal(own.known.visual, part) else None
            for own, part in zip(asked, parts, strict=True)
        ]
        inputs = [
            self._embed(None, own.blocks) if prefix else self._embed(part, own.earlier + own.blocks)
            for own, prefix, part in zip(asked, known, parts, strict=True)
        ]
        batch = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        cache, mask, positions, longest = DynamicCache() if keeps else None, None, None, 0
        lengths = [0] * len(asked)
        if cache is not None and any(known):
            stacked, lengths = stack_prefixes(known)
            for number, (keys, values) in enumerate(stacked):
                cache.update(keys, values, number)
            longest, past = max(lengths), torch.tensor(lengths, device=batch.device)[:, None]
            mask = (torch.arange(longest + batch.shape[1], device=batch.device) >= longest - past).long()
            positions = past + torch.arange(batch.shape[1], device=batch.device)
        hidden = self.model(
            inputs_embeds=batch,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache is not None,
            **{CACHE: cache},
        ).last_hidden_state
        read = []
        for row, (own, part, length) in enumerate(zip(asked, parts, lengths, strict=True)):
            prefix, start = Prefix(part.detach(), own.earlier + own.blocks), longest - length
            if cache is not None:
                prefix = prefix._replace(layers=cut_cache(cache, row, start, start + prefix.length))
            read.append((prefix, block_states(hidden[row, : len(inputs[row])], own.blocks)))
        return read


def _states_by_name(slots: torch.Tensor, asked: list[Asked]) -> dict[str, torch.Tensor]:
    """The states for objectives, with the number of the block and the row of the batch of each slot."""
    blocks = [(own.row, block.num_slots) for own in asked for block in own.blocks]
    sizes = torch.tensor([size for _, size in blocks], dtype=torch.long)
    rows = torch.tensor([row for row, _ in blocks], dtype=torch.long)
    return {
        "fusion_slots": slots,
        "fusion_blocks": torch.arange(len(blocks)).repeat_interleave(sizes).to(slots.device),
        "fusion_rows": rows.repeat_interleave(sizes).to(slots.device),
    }
