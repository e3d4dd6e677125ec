"""Uploads of outputs: `checks` of one, `acceptance` into the store, `refusal_counts` of what was refused."""
