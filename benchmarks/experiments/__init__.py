"""The experiments of `edgestill reproduce`, one a module; each is imported only when it is asked for."""

from __future__ import annotations

EXPERIMENTS = {
    "methods": "edgestill.benchmarks.experiments.methods",
    "heterogeneity": "edgestill.benchmarks.experiments.heterogeneity",
    "scarcity": "edgestill.benchmarks.experiments.scarcity",
    "latent-size": "edgestill.benchmarks.experiments.latent_size",
    "federation": "edgestill.benchmarks.experiments.federation",
    "poisoning": "edgestill.benchmarks.experiments.poisoning",
    "privacy": "edgestill.benchmarks.experiments.privacy",
}
