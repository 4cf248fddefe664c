"""Writes CIFAR-10 as torchvision's `cifar-10-batches-py` from a folder of lossless mosaics.

    python scripts/make_cifar10.py FOLDER data

FOLDER holds `train_0.webp` … `train_4.webp` and `test.webp`, each 100 × 100 images of 32 × 32 pixels row by row in
the original order, and `labels.npz` with `train` [50000] and `test` [10000]. The pixels and labels are the published
ones, but the pickles are not the same bytes: the published ones also hold the images' file names. So torchvision's own
reader, which compares MD5 sums, refuses them; `recipes.data.load("cifar10")` takes them.
"""

import argparse
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def unpack(path: Path) -> np.ndarray:
    """A mosaic's images as uint8 [10000, 3072], each three planes of 1,024 bytes."""
    with Image.open(path, formats=("WEBP", "PNG")) as image:
        tiles = np.asarray(image.convert("RGB")).reshape(100, 32, 100, 32, 3)
    return np.ascontiguousarray(tiles.transpose(0, 2, 4, 1, 3).reshape(-1, 3072))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the mosaics and labels.npz are")
    parser.add_argument("root", type=Path, help="the data folder: cifar-10-batches-py is made in it")
    arguments = parser.parse_args()
    target = arguments.root / "cifar-10-batches-py"
    target.mkdir(parents=True, exist_ok=True)
    with np.load(arguments.folder / "labels.npz") as labels:
        train, test = labels["train"].tolist(), labels["test"].tolist()
    batches = [
        (f"data_batch_{i + 1}", f"train_{i}.webp", train[10000 * i : 10000 * (i + 1)], f"training batch {i + 1} of 5")
        for i in range(5)
    ]
    batches.append(("test_batch", "test.webp", test, "testing batch 1 of 1"))
    for name, mosaic, numbers, label in batches:
        entry = {"batch_label": label, "labels": numbers, "data": unpack(arguments.folder / mosaic)}
        (target / name).write_bytes(pickle.dumps(entry, protocol=2))
    meta = {"num_cases_per_batch": 10000, "label_names": CLASSES, "num_vis": 3072}
    (target / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    print(f"wrote {len(batches)} batches to {target}")


if __name__ == "__main__":
    main()
