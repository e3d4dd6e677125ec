"""Times workload W1 on engine native beside TensorFlow, in turns: `python -m edgestill.benchmarks.tensorflow_step`.

TensorFlow lives in an environment of its own, whose Python the command names. This file is its worker there, too, so
nothing of edgestill is imported at its top. The step is a `tf.function`, channels last, with and without `jit_compile`,
on the bundle's state and batches, which it gets channels last. Its first losses must be native's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

EPSILON, STATISTICS_MOMENTUM = 1e-5, 0.1
PLAIN, COMPILED = "tensorflow", "tensorflow-jit"


def make_step(tf, given: dict[str, np.ndarray]):  # noqa: ANN001, ANN201
    """(images [B, H, W, 3] uint8, labels, teacher's latents) → loss, with the state in variables."""

    def ours(name: str, array: np.ndarray) -> np.ndarray:
        if array.ndim == 4:
            return array.transpose(2, 3, 1, 0)
        if name == "representation.1.weight":  # features come channels last
            latent, channels = len(array), len(given["perception.2.0.bias"])
            side = int((array.shape[1] // channels) ** 0.5)
            return array.reshape(latent, channels, side, side).transpose(2, 3, 1, 0).reshape(-1, latent)
        return array.T

    state = {name[6:]: tf.Variable(ours(name[6:], a)) for name, a in given.items() if name.startswith("state.")}
    names = [name for name in state if not name.startswith("optimizer.") and ".running_" not in name]
    scale_in, shift_in = (tf.constant(a) for a in (1 / (255 * given["std"]), -given["mean"] / given["std"]))
    alpha, rate, momentum = (tf.constant(given[key][0]) for key in ("alpha", "learning_rate", "momentum"))

    def step(images, labels, teacher):  # noqa: ANN001, ANN202
        with tf.GradientTape() as tape:
            x, statistics = tf.cast(images, tf.float32) * scale_in + shift_in, {}
            for block in range(3):
                at = f"perception.{block}"
                x = tf.nn.conv2d(x, state[f"{at}.0.weight"], 1, "SAME")
                x = tf.nn.relu(tf.nn.bias_add(x, state[f"{at}.0.bias"]))
                scale, shift = state[f"{at}.2.weight"], state[f"{at}.2.bias"]
                x, *found = tf.compat.v1.nn.fused_batch_norm(x, scale, shift, epsilon=EPSILON)
                statistics |= dict(zip((f"{at}.2.running_mean", f"{at}.2.running_var"), found, strict=True))
                x = tf.nn.max_pool2d(x, 2, 2, "VALID")
            flat = tf.reshape(x, (x.shape[0], -1))
            latents = flat @ state["representation.1.weight"] + state["representation.1.bias"]
            logits = latents @ state["output.weight"] + state["output.bias"]
            ce = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            loss = (1 - alpha) * ce + alpha * tf.reduce_mean(tf.square(latents - teacher))
        for name, gradient in zip(names, tape.gradient(loss, [state[n] for n in names]), strict=True):
            slot = state[f"optimizer.momentum.{name}"]
            slot.assign(momentum * slot + gradient)
            state[name].assign_sub(rate * slot)
        for name, value in statistics.items():
            state[name].assign_add(STATISTICS_MOMENTUM * (value - state[name]))
        return loss

    return step


def work(path: str, threads: int, compiled: bool) -> None:
    """Answers requests as worker.py does."""
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by itself on some processors, and faster on all
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    given = dict(np.load(path))
    step = tf.function(make_step(tf, given), jit_compile=compiled)
    count = int(given["batches"])
    batches = [[given[f"{key}.{i}"] for key in ("images", "labels", "teacher")] for i in range(count)]
    done = 0
    print(json.dumps({"ready": True, "version": tf.__version__}), flush=True)
    for line in iter(sys.stdin.readline, ""):
        step_ms, losses = [], []
        for _ in range(json.loads(line)["count"]):
            batch = batches[done % count]
            started = time.perf_counter_ns()
            losses.append(float(step(*map(tf.constant, batch))))
            step_ms.append((time.perf_counter_ns() - started) / 1e6)
            done += 1
        print(json.dumps({"step_ms": step_ms, "losses": losses}), flush=True)


def main() -> int:
    import argparse
    import tempfile

    from edgestill.benchmarks import machine
    from edgestill.simulation.bundles import BundleRequest, installed_versions, prepare_bundle

    parser = argparse.ArgumentParser(prog="python -m edgestill.benchmarks.tensorflow_step", description=__doc__)
    parser.add_argument("tensorflow", metavar="PYTHON", help="the Python of its environment")
    parser.add_argument("--threads", default="1,2", metavar="N,M")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="append the lines to this file")
    arguments = parser.parse_args()

    def tell(text: str) -> None:
        print(text, file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="edgestill-bench-") as folder:
        bundle, _ = prepare_bundle(BundleRequest("cnn3", 32), ["native"], Path(folder), tell)
        given = Path(folder, "given.npz")
        write_given(bundle, given)
        origin = {
            "machine": machine.machine_record(),
            "commit": machine.commit_record(),
            "versions": installed_versions(),
            "date": machine.now(),
        }
        for threads in map(int, arguments.threads.split(",")):
            for line in measure(bundle, given, threads, arguments, tell):
                text = json.dumps({**line, **origin})
                print(text)
                if arguments.output:
                    with arguments.output.open("a", encoding="utf-8") as file:
                        file.write(text + "\n")
    return 0


def write_given(bundle: Path, path: Path) -> None:
    """The bundle's state, hyperparameters and batches for the worker, images channels last."""
    from edgestill.benchmarks.workload import hyperparameters, make_batches, read_manifest
    from edgestill.runtime.bundle.bundle import Bundle

    manifest = read_manifest(bundle)
    values, batches = hyperparameters(manifest), make_batches(manifest, seed=0)
    given = {f"state.{name}": array for name, array in Bundle.open(bundle).initial_state().items()}
    given |= {name: np.float32([values[name]]) for name in ("alpha", "learning_rate", "momentum")}
    given |= {key: np.float32(manifest["input"][key]) for key in ("mean", "std")}
    given["batches"] = np.int64(len(batches))
    given["perception.2.0.bias"] = given["state.perception.2.0.bias"]
    for i, batch in enumerate(batches):
        given[f"images.{i}"] = np.ascontiguousarray(batch["images"].transpose(0, 2, 3, 1))
        given |= {f"labels.{i}": batch["labels"], f"teacher.{i}": batch["teacher_latents"]}
    np.savez(path, **given)


def measure(bundle: Path, given: Path, threads: int, arguments, tell) -> list[dict]:  # noqa: ANN001
    """A line an engine; `native_ratio` is the median over the rounds of native's median step ÷ this one's."""
    from statistics import median

    from edgestill.benchmarks.processes import WorkerProcess, read_cpu_use
    from edgestill.benchmarks.step import split_steps
    from edgestill.benchmarks.worker import WorkerSpec

    spec = WorkerSpec("native", str(bundle), threads, 0)
    command = [arguments.tensorflow, "-P", __file__, str(given), str(threads)]
    workers = {"native": WorkerProcess(spec)}
    workers |= {name: WorkerProcess(spec, command=[*command, name]) for name in (PLAIN, COMPILED)}
    rounds: dict[str, list[list[float]]] = {name: [] for name in workers}
    try:
        first, versions, cpu_s = {}, {}, dict.fromkeys(workers, 0.0)
        for name, worker in workers.items():
            tell(f"{threads} threads: {name}")
            versions[name] = worker.wait_ready().get("version")
            first[name] = worker.ask("steps", count=8)["losses"][:2]
            if (apart := max(abs(a - b) for a, b in zip(first[name], first["native"], strict=True))) > 3e-4:
                raise SystemExit(f"{name} makes another step: losses differ by {apart:.2g}, {first}")
        before, names = read_cpu_use(), list(workers)
        for index, count in enumerate(split_steps(arguments.steps, arguments.rounds)):
            for name in names[index % 3 :] + names[: index % 3]:
                started_s = workers[name].cpu_s()
                rounds[name].append(workers[name].ask("steps", count=count)["step_ms"])
                cpu_s[name] += workers[name].cpu_s() - started_s
        after = read_cpu_use()
    finally:
        for worker in workers.values():
            worker.close()
    lines = []
    for name, made in rounds.items():
        steps = [step for one in made for step in one]
        ratios = [median(ours) / median(other) for ours, other in zip(rounds["native"], made, strict=True)]
        lines.append(
            {
                "engine": name,
                "student": "cnn3",
                "batch": 32,
                "threads": threads,
                "tensorflow": versions[name],
                "p50_ms": median(steps),
                "best_ms": min(steps),
                "cpu_ms": 1000 * cpu_s[name] / len(steps),
                "steps": len(steps),
                "native_ratio": median(ratios),
                "native_ratio_of_medians": median(s for one in rounds["native"] for s in one) / median(steps),
                "first_losses_max_abs": max(abs(a - b) for a, b in zip(first[name], first["native"], strict=True)),
                "busy_share": before.share_of_others_until(after) if before and after else None,
            }
        )
    return lines


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[3] in (PLAIN, COMPILED):
        work(sys.argv[1], int(sys.argv[2]), sys.argv[3] == COMPILED)
    else:
        sys.exit(main())
