"""From an image and a text to the tensors a model reads; shipped with every checkpoint."""
