"""An API as OpenAI's clients speak it, under /v1."""
