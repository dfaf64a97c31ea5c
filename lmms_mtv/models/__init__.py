"""Models of transformers with their processors: prompts, answers, identity, and fits without a harness."""
