"""The only code that imports lmms_eval: the model ``mtv``, its bases, and the registration of tasks."""
