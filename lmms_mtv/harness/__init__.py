"""The only code that imports lmms_eval or lm_eval: the model ``mtv`` of each, its bases, and the tasks."""
