"""Preference training with TRL: pairs of an image and its masked self, and answers ranked into data."""

from .losses import anchor_losses, mask_pixels, pair_losses
from .ranking import RankedAnswer, attribute_prompt, best_answers, preference_pairs, preference_row, rank_answers
from .weights import PreferenceColumns, token_weights


__all__ = [
    "PreferenceColumns",
    "RankedAnswer",
    "anchor_losses",
    "attribute_prompt",
    "best_answers",
    "mask_pixels",
    "pair_losses",
    "preference_pairs",
    "preference_row",
    "rank_answers",
    "token_weights",
]
