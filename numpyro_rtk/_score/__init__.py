"""Score callables: adapters, closed forms, and what a score is, resolved once."""
