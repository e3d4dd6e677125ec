"""The experiments of `edgestill reproduce`, one a module; each is imported only when it is asked for."""

from __future__ import annotations

EXPERIMENTS = {
    "methods": "benchmarks.experiments.methods",
    "heterogeneity": "benchmarks.experiments.heterogeneity",
    "scarcity": "benchmarks.experiments.scarcity",
    "latent-size": "benchmarks.experiments.latent_size",
    "federation": "benchmarks.experiments.federation",
    "poisoning": "benchmarks.experiments.poisoning",
    "privacy": "benchmarks.experiments.privacy",
}
