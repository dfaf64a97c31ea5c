"""lm-evaluation-harness: the model ``mtv``, its prompts and its command line."""
