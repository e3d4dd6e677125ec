"""Step 5 of a round, the distillation of its uploads into the global outputs.

`job`: what one distillation computes, of `aggregation`, `alignment`, `screening` and `global_student`. `queue`: which
jobs are due, and the lease under which one replica runs each. `runner`: one job, from the store to its round's end.
`worker`: a job in a process of its own. `loop`: ticks the queue and starts the workers.
"""
