"""A round's life: the pure state machine, its steps in the store, and which devices take part."""
