"""What the tests share: tiny models, prompts, tasks and fakes."""
