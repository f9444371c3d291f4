"""The pieces of plan `pretrain_halves`: tokenizer, vision half, language half, and the loop they share."""
