"""A device in a federation: its state machine, its journal, and how it speaks with the coordinator."""
