"""Your own images: folders of pictures become a model that names the class of a picture.

Whole:        python examples/own_images.py photos          (photos/apple/*.jpg, photos/banana/*.jpg, ...)
Cell by cell: in an editor that knows `# %%`, with FOLDER set below. Without one it makes one, of CIFAR-10.

The export needs PyTorch; what comes after it does not, and runs on a device as it stands.
"""

# %% The folder: one subfolder for each class, pictures of any size. `test/` and `train/` may divide it.
import shlex
import sys
from pathlib import Path

import numpy as np

import edgestill
from edgestill.runtime.data.image_folder import walk

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "photos")
WORK = Path(sys.argv[2] if len(sys.argv) > 2 else "own-images")  # everything is written here
EPOCHS = int(sys.argv[3]) if len(sys.argv) > 3 else 10


def make_folder(folder: Path, each: int = 60) -> None:
    """Pictures of three classes out of the set that edgestill carries."""
    from PIL import Image

    from edgestill.runtime.data.datasets import SHIPPED

    with np.load(SHIPPED["cifar10-mini"]) as data:
        pictures, labels, names = data["x_train"], data["y_train"], data["classes"]
    for label in (0, 3, 8):
        (folder / names[label]).mkdir(parents=True)
        for number, picture in enumerate(pictures[labels == label][:each]):
            Image.fromarray(picture).save(folder / names[label] / f"{number}.png")


if not FOLDER.exists():
    make_folder(FOLDER)

# %% A student: three blocks of convolution, pictures of 32 x 32. `resize` scales yours.
student = edgestill.export(
    "cnn3",
    WORK / "bundle",
    widths=(16, 32, 64),
    latent_size=64,
    class_names=str(FOLDER),
    objective="ce",
    optimizer="adamw",
    engines=("native",),
    overwrite=True,
    resize=True,
)
print("classes:", ", ".join(student.class_names))

# %% Train it: every step is one run of the exported graph, no PyTorch in it.
records = student.train(FOLDER, epochs=EPOCHS, learning_rate=1e-3, augment=("flip",))
print(
    f"{len(records)} steps, loss {records[0].loss:.2f} to {records[-1].loss:.2f}, {records[-1].ms:.1f} ms a step"
)

# %% How well? On the test split where the folder has one, else on what it was trained on.
evaluation = student.evaluate(FOLDER)
which = "test pictures" if FOLDER.joinpath("test").is_dir() else "pictures that it was trained on"
print(f"accuracy {evaluation.accuracy:.0%} of {evaluation.samples} {which}")
student.save(WORK / "student.safetensors")
student.close()

# %% Use it, here or on a device: the bundle and the state are all that is needed.
picture = FOLDER.joinpath(*walk(FOLDER).pictures[0])
with edgestill.open(WORK / "bundle", resize=True) as model:
    model.load_state(WORK / "student.safetensors")
    for found in model.classify(picture):
        print(f"{found.sample}: {found.class_name}, {found.probability:.0%}")

# %% The same from a shell
words = ("predict", WORK / "bundle", "--state", WORK / "student.safetensors", "--resize", picture)
print("edgestill", shlex.join(map(str, words)))
