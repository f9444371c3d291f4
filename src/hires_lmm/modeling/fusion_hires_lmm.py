"""Question-fused queries: a small causal transformer reads the image and the question and answers in n tokens."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel
from transformers import initialization as init

from .bases_hires_lmm import HiResLmmTokenOp, PartContext, Traits
from .blocks_hires_lmm import Block, ImageMemory, Prefix, cut_cache, read_blocks, stack_prefixes
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

    After a call without gradients, what was read hangs on the features that `get_image_features` returned
    (`tokens.memory`, an `ImageMemory` an image). A call that is given the same features goes on from what it shares
    with the conversation read last: a further turn runs its own block only, another first question spares the visual
    tokens. A call that shows the end of a conversation only, the rest being in `cache`, goes on from what
    was read for that very cache. So features may serve many conversations and threads; nothing is kept on the module.
    They hold for the weights they were made with.

    Args:
        context (`PartContext`): Widths and grids around the part.
        options (`Options`): Size of the transformer, numbers of queries.

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

    def read_blocks(self, question: Question) -> list[list[tuple[Block, int]]]:
        """The blocks that a call shows, image by image, each with the position behind its placeholders."""
        return read_blocks(question, self.question)

    def forward(self, tokens: VisualTokens, question: Question | None) -> tuple[VisualTokens, Question | None]:
        """Read images and questions.

        Args:
            tokens (`VisualTokens`): Tokens of the batch at the width of the transformer.
            question (`Question`, *optional*): Readable text and placeholders; None = one blank block an image.

        Returns:
            Tokens of the language model's width, one a placeholder, and the question unchanged.

        Raises:
            ValueError: If a run of placeholders has another length than its block, or a conversation goes on that
                these features do not know.
        """
        shown, earlier = self._ask(tokens, question)
        blocks = [(*before, *own) for before, own in zip(earlier, shown, strict=True)]
        memory = tokens.memory or [ImageMemory(keeps=False) for _ in blocks]
        cache = None if question is None else question.cache
        read = self._read(tokens, memory, blocks, cache)
        states = [part for own, before in zip(read, earlier, strict=True) for part in own.states[len(before) :]]
        slots = torch.cat([tokens.features[:0].to(self.queries), *states])
        counts = [sum(block.num_slots for block in own) for own in shown]
        features = self.output(slots)
        if self.training:  # the word embeddings take part in every loss, also where no question is read
            features = features + (0.0 * self.model.embed_tokens.weight[:1]).sum()
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
            aux={**tokens.aux, **(self._states_by_name(slots, shown, question) if self.training else {})},
            plan=None,
            read=list(zip(memory, read, strict=True)),
        )
        return result, question

    def _states_by_name(
        self, slots: torch.Tensor, shown: list[tuple[Block, ...]], question: Question | None
    ) -> dict[str, torch.Tensor]:
        """The states for objectives, with the number of the block and the row of the batch of each slot."""
        rows = torch.arange(len(shown)) if question is None else question.image_row.cpu()
        sizes = torch.tensor([block.num_slots for own in shown for block in own], dtype=torch.long)
        block_rows = rows.repeat_interleave(torch.tensor([len(own) for own in shown], dtype=torch.long))
        blocks = torch.arange(len(sizes)).repeat_interleave(sizes)
        return {
            "fusion_slots": slots,
            "fusion_blocks": blocks.to(slots.device),
            "fusion_rows": block_rows.repeat_interleave(sizes).to(slots.device),
        }

    def _ask(
        self, tokens: VisualTokens, question: Question | None
    ) -> tuple[list[tuple[Block, ...]], list[tuple[Block, ...]]]:
        """The blocks of each image that the call shows, and those before them."""
        if question is None or question.placeholder is None:
            blank: list[tuple[Block, ...]] = [
                (Block((), min(count, self.options.num_queries)),) for count in tokens.num_tokens
            ]
            return blank, [() for _ in blank]
        shown = [tuple(block for block, _ in own) for own in self.read_blocks(question)]
        earlier: list[tuple[Block, ...]] = [() for _ in shown]
        if question.earlier is not None:
            earlier = list(question.earlier)
        elif question.continues:
            earlier = [self._known(tokens, image, own, question) for image, own in enumerate(shown)]
        rows = question.image_row.tolist()
        for own, before, row, num_tokens in zip(shown, earlier, rows, tokens.num_tokens, strict=True):
            self._check_runs(own, len(before), num_tokens, row)
        return shown, earlier

    def _known(self, tokens: VisualTokens, image: int, own: tuple, question: Question) -> tuple[Block, ...]:
        """The blocks that a language model cache holds of a conversation."""
        prefix = None if tokens.memory is None else tokens.memory[image].of_cache(question.cache)
        if prefix is not None:
            return prefix.blocks
        if own and own[0].num_slots == tokens.num_tokens[image] > self.options.later_queries:
            return ()  # the image comes in this turn
        raise ValueError(
            "The conversation goes on in cache, but these image features have not read its beginning for "
            'that cache. Pass the features of the first turn as mm_encoder_outputs={"image": features} in every turn, '
            "with the cache object that the turn before returned; or pass the whole conversation to generate, or "
            "without cache."
        )

    def _check_runs(self, own: tuple[Block, ...], num_earlier: int, num_tokens: int, row: int) -> None:
        """Compare the runs of placeholders of one conversation with the blocks that belong there."""
        later = min(num_tokens, self.options.later_queries)
        wanted = [later if number else num_tokens for number in range(num_earlier, num_earlier + len(own))]
        given = [block.num_slots for block in own]
        if given != wanted or max(given, default=0) > self.options.num_queries:
            raise ValueError(
                f"Conversation {row} has runs of {given} image tokens, but fusion makes {wanted} (at most "
                f"{self.options.num_queries} for the image, {self.options.later_queries} for each later turn). Pass "
                "input_ids and the view tensors of one processor call."
            )

    def _read(
        self, tokens: VisualTokens, memory: list[ImageMemory], blocks: list[tuple[Block, ...]], cache: Any
    ) -> list[Prefix]:
        """Read each conversation to its end, from where it is known."""
        parts, may_use = tokens.per_image(tokens.features), not torch.is_grad_enabled()
        jobs = [(id(own), asked) for own, asked in zip(memory, blocks, strict=True)]
        first = [jobs.index(job) for job in jobs]  # beams of one conversation are read once
        done: dict[int, Prefix] = {}
        todo: list[tuple[int, Prefix | None]] = []
        for image in sorted(set(first)):
            known = (memory[image].of_cache(cache) or memory[image].last) if may_use else None
            known = known.shared(blocks[image]) if known is not None and known.layers else None
            if known is not None and len(known.blocks) == len(blocks[image]):
                done[image] = known
            else:
                todo.append((image, known))
        keeps = [may_use and memory[image].keeps for image, _ in todo]
        for (image, _), prefix in zip(todo, self._run(parts, todo, blocks, keeps), strict=True):
            done[image] = prefix
            if may_use and memory[image].keeps:
                memory[image].last = prefix
        return [done[image] for image in first]

    def _embed(self, visual: torch.Tensor | None, blocks: tuple[Block, ...]) -> torch.Tensor:
        """Inputs of a conversation `(L, C)`: visual tokens where they are new, then questions and queries."""
        pieces = [] if visual is None else [visual.to(self.queries.dtype)]
        for block in blocks:
            ids = torch.tensor(block.question, dtype=torch.long, device=self.queries.device)
            pieces += [self.model.embed_tokens(ids), self.slots(block.num_slots)]
        return torch.cat(pieces)

    def _run(
        self,
        parts: list[torch.Tensor],
        todo: list[tuple[int, Prefix | None]],
        blocks: list[tuple[Block, ...]],
        keeps: list[bool],
    ) -> list[Prefix]:
        """Run the transformer on what is new of some conversations.

        Known positions are padded in front and masked; new ones are padded behind their end, where no causal reader
        looks.
        """
        if not todo:
            return []
        prefixes = [prefix for _, prefix in todo]
        new = [blocks[image][len(prefix.blocks) if prefix else 0 :] for image, prefix in todo]
        inputs = [
            self._embed(None if prefix else parts[image], own) for (image, prefix), own in zip(todo, new, strict=True)
        ]
        batch = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        cache, mask, positions, longest = DynamicCache() if any(keeps) or any(prefixes) else None, None, None, 0
        lengths = [0] * len(todo)
        if cache is not None and any(prefixes):
            stacked, lengths = stack_prefixes(prefixes)
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
        for number, ((image, prefix), own) in enumerate(zip(todo, new, strict=True)):
            layers: tuple = ()
            if cache is not None and keeps[number]:
                start = longest - lengths[number]
                layers = cut_cache(cache, number, start, start + lengths[number] + inputs[number].shape[0])
            base = prefix or Prefix((), (), (parts[image].shape[0],), ())
            read.append(base.extended(own, hidden[number], lengths[number], layers))
        return read
