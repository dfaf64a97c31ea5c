"""lmms-eval: the model ``mtv``, its bases, its prompts and its tasks."""
