"""The coordinator: tasks, rounds, uploads, step 5, and what serves them over HTTP."""
