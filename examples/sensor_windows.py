"""Sensor windows: 1.28 s of six channels become a model that names the movement, and goes on learning on the device.

Whole:        python examples/sensor_windows.py windows.npz
Cell by cell: in an editor that knows `# %%`, with DATA set below. Without a file it makes one, of three movements.

The arrays of the .npz:

| array                | shape and dtype                 | what                                               |
| -------------------- | ------------------------------- | -------------------------------------------------- |
| `x_train`, `x_test`  | [N, channels, length], float32  | windows, each channel scaled to about -1 to 1      |
| `y_train`, `y_test`  | [N], integers from 0            | the class of each window                           |
| `classes`            | [K], text                       | what the classes are called; may be left out       |
| `users_train`        | [N], integers or text           | whose window it is; may be left out                |

Without a split into training and test: `x` and `y`, and `users`. `edgestill simulate --by-user` needs the users.
"""

# %%
import sys
from pathlib import Path

import numpy as np

import edgestill

DATA = Path(sys.argv[1] if len(sys.argv) > 1 else "windows.npz")
WORK = Path(sys.argv[2] if len(sys.argv) > 2 else "sensor-windows")  # everything is written here
EPOCHS = int(sys.argv[3]) if len(sys.argv) > 3 else 5
CHANNELS, LENGTH = 6, 128  # acceleration and rotation, 100 samples a second
MOVEMENTS = ("still", "walking", "cycling")


def make_windows(path: Path, count: int = 480, users: int = 8) -> None:
    """Windows of three movements: their frequencies and strengths differ, and every user moves a little differently."""
    draw = np.random.default_rng(0)
    labels, whose = np.arange(count) % len(MOVEMENTS), draw.integers(0, users, count)
    time_s = np.arange(LENGTH) / 100
    strength = (
        np.array([0.02, 0.5, 0.3])[labels, None, None] * draw.uniform(0.7, 1.3, (users, CHANNELS, 1))[whose]
    )
    frequency_hz = np.array([0.3, 1.9, 1.2])[labels] * draw.uniform(0.9, 1.1, users)[whose]
    phase = draw.uniform(0, 2 * np.pi, (count, CHANNELS, 1))
    windows = strength * np.sin(2 * np.pi * frequency_hz[:, None, None] * time_s + phase)
    windows = (windows + draw.normal(0, 0.05, windows.shape)).astype(np.float32)
    rest = np.arange(count) < count * 3 // 4
    np.savez(
        path, x_train=windows[rest], y_train=labels[rest], x_test=windows[~rest], y_test=labels[~rest],
        classes=np.array(MOVEMENTS), users_train=whose[rest],
    )  # fmt: skip


if not DATA.exists():
    make_windows(DATA)
with np.load(DATA) as file:
    data = dict(file)
print({name: array.shape for name, array in data.items()})
part = "_train" if "x_train" in data else ""
windows, labels = data[f"x{part}"], data[f"y{part}"]
unseen = data.get("x_test", windows)
users = data.get(f"users{part}", np.zeros(len(labels)))
classes = tuple(map(str, data.get("classes", range(labels.max() + 1))))

# %% A student of one-dimensional convolutions, for windows of this shape
student = edgestill.export(
    "cnn1d",
    WORK / "bundle",
    input_shape=windows.shape[1:],
    latent_size=32,
    class_names=classes,
    classes=len(classes),
    objective="ce",
    optimizer="adamw",
    engines=("native",),
    overwrite=True,
)

# %% Train and evaluate it: on the test windows where there are some, else on all
records = student.train(DATA, epochs=EPOCHS, learning_rate=1e-3)
print(f"{len(records)} steps, loss {records[0].loss:.2f} to {records[-1].loss:.2f}")
print(f"accuracy {student.evaluate(DATA).accuracy:.0%} of the {'test' if 'x_test' in data else 'same'} windows")
student.save(WORK / "student.safetensors")
student.close()

# %% On the device, without PyTorch: it learns on from a person's own windows, and names what it sees.
with edgestill.open(WORK / "bundle") as model:
    model.load_state(WORK / "student.safetensors")
    own = users == users[0]
    model.train((windows[own], labels[own]), epochs=1, learning_rate=1e-4)
    for found in model.classify(unseen[:3]):
        print(f"window {found.sample}: {found.class_name}, {found.probability:.0%}")
    model.save(WORK / "student.safetensors")
