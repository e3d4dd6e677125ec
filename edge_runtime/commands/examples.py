"""Command lines that every `--help` ends with; a test parses each of them, and wants one of every command."""

from __future__ import annotations

import argparse

EXAMPLES: dict[str, tuple[str, ...]] = {
    "export": (
        "edgestill export --student cnn3 --output cnn3-bundle",
        "edgestill export --student cnn3 --common-head --optimizer adamw --engines native --output cnn3-bundle",
        "edgestill export --student leaf.py:LeafNet --objective both --engines native --output leaf-bundle",
        "edgestill export --inference --bundle leaf-bundle --state leaf.safetensors --output leaf.onnx",
    ),
    "verify": ("edgestill verify leaf-bundle", "edgestill verify leaf-bundle --steps 5 --engines native"),
    "train": (
        "edgestill train leaf-bundle --data photos --resize --epochs 5 --state leaf.safetensors",
        "edgestill train leaf-bundle --data cifar10-mini --lr 0.05 --schedule cosine --state leaf.safetensors",
    ),
    "evaluate": (
        "edgestill evaluate leaf-bundle --data photos --resize --state leaf.safetensors",
        "edgestill evaluate leaf-bundle --data cifar10-mini --state leaf.safetensors --json",
    ),
    "predict": (
        "edgestill predict leaf-bundle --state leaf.safetensors --resize holiday.jpg photos",
        "edgestill predict leaf-bundle --state leaf.safetensors --data cifar10-mini --csv > classes.csv",
    ),
    "inspect": ("edgestill inspect leaf-bundle",),
    "doctor": ("edgestill doctor",),
    "serve": (
        "edgestill serve --data-dir federation",
        "edgestill serve --data-dir federation --host 0.0.0.0 --tls-cert server.pem --tls-key server.key",
        "EDGESTILL_DASHBOARD_TOKEN=choose-your-own edgestill serve --data-dir federation --host 0.0.0.0",
    ),
    "task create": (
        "edgestill task create --data-dir federation --name birds --bundle cnn3-bundle --bundle cnn4-bundle \\\n    "
        "--global-bundle cnn5-bundle --transfer cifar10-transfer-mini --transfer-labels --test cifar10-mini",
        "edgestill task create --data-dir federation --file birds.toml --rounds 3",
    ),
    "task list": ("edgestill task list --data-dir federation",),
    "task show": ("edgestill task show --data-dir federation birds",),
    "task export": (
        "edgestill task export --data-dir federation birds --output birds.safetensors --bundle birds-bundle",
        "edgestill task export --data-dir federation birds --round last --output birds.safetensors",
    ),
    "task stop": ("edgestill task stop --data-dir federation birds",),
    "enrol": ("edgestill enrol --data-dir federation --task birds --count 5",),
    "backup": ("edgestill backup --data-dir federation --output /var/backups/federation",),
    "restore": ("edgestill restore /var/backups/federation --data-dir federation-again",),
    "downgrade": ("edgestill downgrade --data-dir federation --to 0004",),
    "join": (
        "edgestill join http://192.0.2.10:8000 --code AAAAA-BBBBB-CCCCC-DDDDD --data photos --resize",
        "edgestill join --data photos --resize --once",
    ),
    "demo": ("edgestill demo", "edgestill demo --output first-look --seed 1 --keep"),
    "device list": ("edgestill device list", "edgestill device list birds --data-dir federation --json"),
    "device revoke": ("edgestill device revoke d-abcdefghijklmnop --data-dir federation",),
    "simulate": (
        "edgestill simulate --devices 4 --rounds 2",
        "edgestill simulate --gamma 0.25 --output results",
    ),
    "reproduce": ("edgestill reproduce methods --quick", "edgestill reproduce federation --data images"),
    "bench step": ("edgestill bench step --students cnn3 --batches 32 --threads 1 --steps 40",),
    "bench coordinator": ("edgestill bench coordinator",),
    "completion": (
        "edgestill completion bash >> ~/.bash_completion",
        "edgestill completion zsh > ~/.zfunc/_edgestill",
        "edgestill completion fish | source",
    ),
}


class _Formatter(argparse.HelpFormatter):
    """Wraps what is prose, and leaves examples a line each."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


def show_examples(parser: argparse.ArgumentParser, command: str) -> None:
    """Ends the help of a command, and of those below it, with their examples."""
    if (examples := EXAMPLES.get(command)) is not None:
        parser.formatter_class = _Formatter
        parser.epilog = "\n  ".join(("examples:", *examples))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                show_examples(child, f"{command} {name}")
