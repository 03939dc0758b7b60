"""Images with classes: the bundled digits, folders with one folder per class, tables with a column of images."""

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.runtime.errors import DataError
from utils.runtime.optional import require
from utils.runtime.resources import available_memory, format_bytes
from utils.training.corpora import load_digits
from utils.training.data_report import DataReport, class_counts, class_warnings
from utils.training.labels import MISSING, encode_labels
from utils.training.needs import Needs
from utils.training.prepared_data import PreparedData
from utils.training.splitting import split_rows
from utils.training.tables import Table, choose_column
from utils.training.text_files import Files, class_folders

DIGIT_CLASSES = 10
MOST_CORRUPT = 0.1
"""Share of images that may be unreadable."""
NAMED = 3
DEFAULT_SHAPE = (3, 64, 64)
"""Shape of images for a model that does not say."""


def prepare_digits(needs: Needs, reference: str) -> PreparedData:
    """Prepare the bundled digits.

    Raises:
        DataError: The model tells fewer than ten classes apart, or takes no images.
    """
    if needs.num_labels is not None and needs.num_labels < DIGIT_CLASSES:
        raise DataError(
            f"{reference} has labels 0 to {DIGIT_CLASSES - 1}, and the model tells {needs.num_labels} classes apart.",
            f"Expected a model with at least {DIGIT_CLASSES} outputs.",
            f"Build it with num_classes={DIGIT_CLASSES}.",
        )
    shape = _shape(needs, (1, 8, 8))
    images, labels = load_digits()
    resized = resize(torch.from_numpy(images)[:, None], shape[1:]).expand(-1, shape[0], -1, -1)
    keys = [image.tobytes() for image in images]
    names = [str(digit) for digit in range(DIGIT_CLASSES)]
    # A mirrored digit is another sign.
    return _prepared(resized, labels, keys, names, needs, reference, [], [], {"flips": False})


def prepare_folder(files: Files, needs: Needs, reference: str) -> PreparedData:
    """Prepare images that lie in one folder per class.

    Raises:
        DataError: There are no class folders, too many images are damaged, or the classes do not fit the model.
    """
    folders = class_folders(files.images, files.root)
    if folders is None:
        raise DataError(
            f"The images in {files.root} do not all lie in a folder that names their class.",
            "Expected one folder per class, such as cats/1.jpg and dogs/2.jpg.",
            "Sort them into folders.",
        )
    readers = [_file_reader(path) for path in files.images]
    names = [str(path.relative_to(files.root)) for path in files.images]
    return _decoded(readers, names, folders, needs, reference, [f"classes are the folders of {files.root.name}"])


def prepare_column(table: Table, columns: dict[str, str], needs: Needs, reference: str) -> PreparedData:
    """Prepare images that a column of a table holds: pictures, their bytes, or paths.

    Raises:
        DataError: No column fits, too many images are damaged, or the classes do not fit the model.
    """
    named = [columns["label"]] if "label" in columns else []
    image_column, image_reason = choose_column(table, "image", columns, named)
    label_column, label_reason = choose_column(table, "label", columns, (image_column,))
    notes = [f"images are the column {image_column!r}: {image_reason}", f"labels are {label_column!r}: {label_reason}"]
    base = Path(table.origin).parent
    readers = [_value_reader(value, base) for value in table.columns[image_column]]
    rows = [f"row {index + 1}" for index in range(len(table))]
    labels, classes = table.columns[label_column], table.names.get(label_column, ())
    return _decoded(readers, rows, labels, needs, reference, notes, classes, table.held)


def resize(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize images (samples, channels, height, width): averaged where they shrink, interpolated where they grow."""
    if size == tuple(images.shape[2:]):
        return images
    if size[0] <= images.shape[2] and size[1] <= images.shape[3]:
        return torch.nn.functional.interpolate(images, size=size, mode="area")
    return torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _shape(needs: Needs, default: tuple[int, int, int]) -> tuple[int, int, int]:
    shape = default if needs.image_shape is None else tuple(needs.image_shape)
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise DataError(f"The model's image shape is {shape}.", "Expected channels, height and width.")
    return (shape[0], shape[1], shape[2])


def _decoded(
    readers: Sequence[Callable[[], Any]],
    names: Sequence[str],
    values: Sequence[Any],
    needs: Needs,
    reference: str,
    notes: list[str],
    class_names: Sequence[str] = (),
    fixed: Sequence[bool] | None = None,
) -> PreparedData:
    """Decode images one by one at the model's size, leave out damaged ones, and prepare the rest."""
    library = require("PIL.Image", "read images", "pillow")
    shape = _shape(needs, DEFAULT_SHAPE)
    size = int(np.prod(shape)) * 4 * len(readers)
    if 3 * size > available_memory():
        raise DataError(
            f"{reference} holds {len(readers):,} images, which take {format_bytes(size)} at {shape}.",
            f"Expected at most {format_bytes(available_memory() / 3)}: images are kept in memory.",
            "Use a part of them, or a model for smaller images.",
        )
    pixels: list[np.ndarray] = []
    kept: list[int] = []
    broken: list[str] = []
    for index, read in enumerate(readers):
        try:
            with library.open(read()) as image:
                pixels.append(_pixels(image, shape, library))
            kept.append(index)
        except (OSError, ValueError, SyntaxError, EOFError, TypeError, library.DecompressionBombError) as error:
            broken.append(f"{names[index]} ({str(error)[:80] or type(error).__name__})")
    found = []
    if broken:
        listed = ", ".join(broken[:NAMED]) + (f" and {len(broken) - NAMED} more" if len(broken) > NAMED else "")
        if not kept or len(broken) > MOST_CORRUPT * len(readers):
            raise DataError(
                f"{len(broken)} of {len(readers)} images of {reference} cannot be read: {listed}.",
                f"Expected at most {MOST_CORRUPT:.0%}: with more, something is wrong with all of them.",
                "Download or make them again.",
            )
        found.append(f"{len(broken)} of {len(readers)} images cannot be read and were left out: {listed}")
        warnings.warn(f"{reference}: {found[0]}.", stacklevel=4)
    labels = encode_labels([values[index] for index in kept], needs.num_labels, reference, class_names)
    usable = labels.numbers != MISSING
    if not usable.all():
        found.append(f"{(~usable).sum():,} images have no label and were left out")
    stacked = np.stack(pixels)
    # The same picture twice counts once; which file comes first is decided by name.
    first: dict[tuple[bytes, int], int] = {}
    for index in np.flatnonzero(usable).tolist():
        first.setdefault((stacked[index].tobytes(), int(labels.numbers[index])), index)
    chosen = np.array(list(first.values()))
    keys = [key for key, _ in first]
    images = torch.from_numpy(stacked[chosen])
    return _prepared(
        images, labels.numbers[chosen], keys, labels.names, needs, reference, [*notes, labels.reason], found,
        {}, int(usable.sum()) - len(chosen), None if fixed is None else [fixed[kept[index]] for index in chosen],
    )  # fmt: skip


def _prepared(
    images: Tensor,
    labels: np.ndarray,
    keys: Sequence[bytes],
    names: list[str],
    needs: Needs,
    reference: str,
    notes: list[str],
    found: list[str],
    more: dict[str, Any],
    duplicates: int = 0,
    fixed: Sequence[bool] | None = None,
) -> PreparedData:
    """Split images in [0, 1], and normalise them by the training ones or as a first part was."""
    held = split_rows(keys, labels, needs.share_of_samples, needs.seed, reference, fixed)
    training = torch.from_numpy(~held)
    mean, deviation = float(images[training].mean()), float(images[training].std())
    if needs.like is not None:
        # Of several parts all are seen alike, whatever a later one looks like.
        mean, deviation = needs.like.facts["mean"], needs.like.facts["deviation"]
    pixels = (images - mean) / (deviation or 1.0)
    targets = torch.from_numpy(labels)
    parts = [{"pixel_values": pixels[mask].contiguous(), "labels": targets[mask]} for mask in (training, ~training)]
    classes = class_counts(names, labels[~held], labels[held])
    counts = np.bincount(labels[held])
    known = set(np.array(keys, dtype=object)[~held])
    again = sum(key in known for key in np.array(keys, dtype=object)[held])
    found += class_warnings(classes) + ([f"{again} held-out images are in the training data"] if again else [])
    report = DataReport(
        "images",
        int((~held).sum()),
        int(held.sum()),
        duplicates,
        len(keys) - len(set(keys)),
        overlap=None,
        classes=classes,
        notes=notes,
        warnings=found,
    )
    facts = {
        "samples": len(labels),
        "classes": len(names),
        "class_names": names,
        "largest_class": float(counts.max() / counts.sum()),
        "image_shape": list(images.shape[1:]),
        "mean": mean,
        "deviation": deviation,
        **more,
        "report": report.to_dict(),
    }
    return PreparedData(reference, needs.task, parts[0], parts[1], None, facts)


def _pixels(image: Any, shape: tuple[int, int, int], library: Any) -> np.ndarray:
    """Return an image in [0, 1] at a shape: its middle, as large as fits, resized."""
    channels, height, width = shape
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    if mode is None:
        raise DataError(f"The model takes images of {channels} channels.", "Expected 1, 3 or 4.")
    image = image.convert(mode)
    scale = min(image.width / width, image.height / height)
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    image = image.crop((left, top, left + wide, top + high)).resize((width, height), library.Resampling.BILINEAR)
    values = np.asarray(image, dtype=np.float32) / 255
    return np.ascontiguousarray(values[None] if values.ndim == 2 else values.transpose(2, 0, 1))


def _file_reader(path: Path) -> Callable[[], Any]:
    return lambda: path


def _value_reader(value: Any, base: Path) -> Callable[[], Any]:
    """Return how to open what a table holds as an image."""

    def read() -> Any:
        if isinstance(value, dict):
            return io.BytesIO(value["bytes"]) if value.get("bytes") else base / value["path"]
        if isinstance(value, bytes):
            return io.BytesIO(value)
        if isinstance(value, str):
            return base / value
        if hasattr(value, "save"):
            # A picture that the datasets library decoded already.
            buffer = io.BytesIO()
            value.save(buffer, "PNG")
            buffer.seek(0)
            return buffer
        raise ValueError(f"a {type(value).__name__} is no image")

    return read
