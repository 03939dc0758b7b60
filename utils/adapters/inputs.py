"""Inputs to try a model with: plausible shapes, the likeliest first, and examples stretched to a size."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.detection import CONFIG_KEYS, Detection, config_number, kind_by_name
from utils.adapters.roles import may_be_labels, role_of

CONVOLVED_LENGTHS = (64, 100, 128, 256, 512, 1024, 16000)
LONGEST_PROBE = 2048
LAZY_WIDTH = 16
"""Features given to a layer that takes its size from the first input; it states 0 until then."""
PROBE_SECONDS = 1.0


def image_shapes(module: nn.Module, config: Mapping[str, Any]) -> Iterator[tuple[tuple[int, int, int], str]]:
    """Yield plausible image shapes ``(channels, height, width)``, the likeliest first, each with its reason."""
    convolution = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels = config_number(config, "channels")
    if channels is None and convolution is not None and convolution.in_channels:
        channels = Detection(convolution.in_channels, "inputs of the first Conv2d")
    usual = [Detection(3, "colour is usual"), Detection(1, "grey is usual")]
    # The first convolution may come after a transform that makes other channels.
    counts = [channels, *(usual[:1] if channels.value > 4 else [])] if channels else usual
    size = config_number(config, "image_size")
    pair = next((config[key] for key in CONFIG_KEYS["image_size"] if isinstance(config.get(key), (list, tuple))), None)
    for channel in counts:
        if pair is not None and len(pair) >= 2:
            yield (channel.value, int(pair[-2]), int(pair[-1])), "the image size in the config"
        elif size is not None:
            yield (channel.value, size.value, size.value), f"{size.reason}; channels: {channel.reason}"
        else:
            # A size that is cheap comes first: a network that takes any size takes this one too.
            for side in (64, 224, 32, 28, 16, 8, 96, 128, 256, 299, 48, 84, 100):
                yield (channel.value, side, side), f"the first usual size that runs; channels: {channel.reason}"


def feature_shapes(module: nn.Module, config: Mapping[str, Any]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield plausible shapes of real-valued input without the batch, each with its reason."""
    for child in module.modules():
        # Quantised and adapted linear layers are not nn.Linear, but say their width as it does.
        if isinstance(width := getattr(child, "in_features", None), int):
            reason = "inputs of the first Linear" if width else "any number that a lazy Linear may get"
            yield (width or LAZY_WIDTH,), reason
            yield (12, width or LAZY_WIDTH), f"{reason}, as a sequence"
            break
        if isinstance(child, (nn.LSTM, nn.GRU, nn.RNN)):
            yield (12, child.input_size), f"input size of the first {type(child).__name__}"
            break
        if isinstance(child, nn.RNNCellBase):
            yield (child.input_size,), f"input size of the first {type(child).__name__}"
            yield (12, child.input_size), f"input size of the first {type(child).__name__}, as a sequence"
            break
        if isinstance(child, nn.Conv1d):
            channels = child.in_channels or LAZY_WIDTH
            for length in CONVOLVED_LENGTHS:
                yield (channels, length), f"channels of the first Conv1d, and {length} steps run"
            yield (64, channels), "channels of the first Conv1d, time first"
            break
        if isinstance(child, nn.MultiheadAttention):
            yield (12, child.embed_dim), "width of the first attention"
            break
        if isinstance(child, (nn.BatchNorm1d, nn.LayerNorm)):
            normed = child.num_features if isinstance(child, nn.BatchNorm1d) else child.normalized_shape[-1]
            normed = normed or LAZY_WIDTH
            yield (normed,), f"width of the first {type(child).__name__}"
            yield (12, normed), f"width of the first {type(child).__name__}, as a sequence"
            break
    for name, parameter in module.named_parameters(recurse=False):
        # A table of columns gives each of them a row of its own, or a column.
        for size in dict.fromkeys(parameter.shape):
            if size > 1:
                yield (size,), f"a side of `{name}`"
    if (width_in_config := config_number(config, "features")) is not None:
        yield (width_in_config.value,), width_in_config.reason
        yield (12, width_in_config.value), f"{width_in_config.reason}, as a sequence"


def candidate_kinds(module: nn.Module, config: Mapping[str, Any], main: str) -> list[str]:
    """Return the kinds of main input to try, the likeliest first."""
    named = {"numbers": "features", "categories": "tokens"}.get(kind := kind_by_name(main) or "", kind)
    has_embedding = any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in module.modules())
    has_convolution = any(isinstance(m, nn.Conv2d) for m in module.modules())
    kinds = [named] if named else []
    if config_number(config, "vocab_size") is not None or (has_embedding and not has_convolution):
        kinds.append("tokens")
    if has_convolution or config_number(config, "image_size") is not None:
        kinds.append("image")
    kinds += ["features", "tokens" if has_embedding else "image", "image", "tokens"]
    return list(dict.fromkeys(kinds))


def categorical_sizes(module: nn.Module) -> list[tuple[int, int]]:
    """Return rows and width of every embedding table."""
    return [(m.num_embeddings, m.embedding_dim) for m in module.modules() if isinstance(m, nn.Embedding)]


def sound_shapes(config: Mapping[str, Any], kind: str) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield plausible shapes of sound without the batch: a wave, or frames of mel bins."""
    bins = config.get("num_mel_bins")
    if kind == "wave":
        # Some call the frames of a spectrogram input values, too.
        if isinstance(bins, int) and isinstance(frames := config.get("max_length"), int):
            yield (frames, bins), "`max_length` and `num_mel_bins` in the config"
        yield (16000,), "one second of sound at 16 kHz"
        return
    bins = bins or 80
    if isinstance(positions := config.get("max_source_positions"), int):
        yield (bins, 2 * positions), "mel bins and twice `max_source_positions` in the config"
    yield (128, bins), "time and mel bins"
    yield (bins, 128), "mel bins and time"


def main_example(examples: Mapping[str, Any]) -> str | None:
    """Return the name of the tensor that carries the content: one with a usual name, else the first with samples."""
    batched = [name for name, value in examples.items() if isinstance(value, Tensor) and value.dim() and value.numel()]
    return next((name for name in batched if kind_by_name(name)), batched[0] if batched else None)


def length_inputs(examples: Mapping[str, Any], main_name: str) -> set[str]:
    """Return the names of inputs that say how long each sample of the main input is, by name or by their numbers.

    A whole number per sample is a length by its numbers if all lie between 1 and the number of steps, and the longest
    is all of them.

    Args:
        examples: Keyword arguments; tensors are batch first.
        main_name: The one among them that carries the content.
    """
    main, found = examples[main_name], set()
    for name, value in examples.items():
        if name == main_name or not isinstance(value, Tensor) or value.dim() != 1 or not value.numel():
            continue
        if value.is_floating_point() or value.dtype == torch.bool or len(value) != len(main) or main.dim() < 2:
            continue
        role = role_of(name)
        if role == "lengths" or (role is None and int(value.min()) > 0 and int(value.max()) == main.shape[1] > 1):
            found.add(name)
    return found


def _fitted(rows: Tensor, examples: Tensor, length: int) -> Tensor:
    """Return lengths that fit texts of a length: none above it, one that reaches it, descending where they were."""
    fitted = rows.clamp(1, length)
    fitted[fitted.argmax()] = length
    # A packed sequence asks for the longest first unless it is told otherwise, so repeated rows have to be sorted.
    descending = bool((examples[:-1] >= examples[1:]).all())
    return fitted.sort(descending=True).values if descending else fitted


def stretched(
    examples: Mapping[str, Any],
    main_name: str,
    modality: str,
    batch_size: int | None,
    length: int | None,
    vocab_size: int | None,
    generator: torch.Generator,
    device: torch.device,
) -> dict[str, Any]:
    """Stretch a user's example to a batch size and, for token ids, to a length, by repeating it.

    Args:
        examples: Keyword arguments; tensors are batch first.
        main_name: The one among them that carries the content.
        modality: As in `utils.adapters.ModelAdapter`.
        batch_size: Wanted number of samples; None to keep everything as it is.
        length: Wanted tokens per sample, or None to keep the example's.
        vocab_size: Range from which the main input's token ids are drawn anew; with None each column keeps to the
            values that it has, for columns of a table have ranges of their own.
        generator: Draws them.
        device: Where the tensors go.
    """
    main = examples[main_name]
    lengths = length_inputs(examples, main_name)
    result: dict[str, Any] = {}
    for name, value in examples.items():
        if not isinstance(value, Tensor):
            result[name] = value
            continue
        steps = main.shape[1] if main.dim() > 1 else 1
        if batch_size is not None and may_be_labels(name) and value.shape == (len(main) * steps,) != (len(main),):
            # One label for each position of all samples.
            part = {main_name: torch.empty(main.shape), name: value.view(len(main), steps)}
            args = (main_name, modality, batch_size, length, vocab_size, generator, device)
            result[name] = stretched(part, *args)[name].flatten()
            continue
        if batch_size is None or value.dim() == 0 or value.shape[0] != main.shape[0]:
            # A copy where the example is used whole, for some models write to what they are given.
            result[name] = value.to(device, copy=True) if batch_size is None else value
            continue
        rows = value.repeat(-(-batch_size // value.shape[0]), *[1] * (value.dim() - 1))[:batch_size]
        if name in lengths:
            rows = _fitted(rows, value, length if length is not None and modality == "tokens" else main.shape[1])
        along_tokens = modality == "tokens" and rows.dim() > 1 < main.dim() and value.shape[1] == main.shape[1]
        if length is not None and along_tokens:
            rows = rows.repeat(1, -(-length // rows.shape[1]), *[1] * (rows.dim() - 2))[:, :length]
        if name == main_name and not value.is_floating_point() and rows.dim() == 2:
            rows = _drawn(rows, value, vocab_size, generator)
        result[name] = rows.to(device)
    return result


def _drawn(rows: Tensor, examples: Tensor, vocab_size: int | None, generator: torch.Generator) -> Tensor:
    """Return whole numbers in the shape of `rows`: any below `vocab_size`, or else what each column of examples has."""
    if vocab_size is not None:
        return torch.randint(vocab_size, rows.shape, generator=generator).to(rows.dtype)
    chosen = torch.randint(len(examples), (len(rows), examples.shape[1]), generator=generator)
    drawn = examples.cpu().gather(0, chosen)
    # Columns beyond the example's exist only where it was lengthened.
    return torch.cat([drawn, rows[:, examples.shape[1] :].cpu()], dim=1)[:, : rows.shape[1]]


def table_sizes(module: nn.Module) -> list[int]:
    """Return the lengths that a table of positions or a stored mask may have: sizes of a model's tensors, ascending."""
    tensors = [*module.parameters(), *module.buffers()]
    return sorted({size for tensor in tensors for size in tensor.shape if 1 < size <= LONGEST_PROBE})


def longest_length(run: Callable[[int], None], start: int, likely: Sequence[int] = ()) -> Detection[int | None]:
    """Find the longest sequence that runs, by doubling and then closing in.

    Args:
        run: Runs one forward pass at a length and raises when that fails.
        start: A length that runs.
        likely: Lengths at which a limit is likelier than elsewhere, ascending.

    Returns:
        The length; None when none failed before the search ended.
    """
    started = time.perf_counter()
    took = [0.0]

    def runs(length: int) -> bool:
        began = time.perf_counter()
        try:
            run(length)
        except Exception:
            return False
        took.append(time.perf_counter() - began)
        return True

    if not runs(start):
        return Detection(None, f"not found by trying: {start} tokens do not run with a batch of one")
    good, bad = start, None
    while bad is None and good < LONGEST_PROBE:
        # Twice the length takes twice the time, or four times where every pair of tokens is looked at.
        growth = min(4.0, max(2.0, took[-1] / took[-2])) if took[-2] else 2.0
        if time.perf_counter() - started + growth * took[-1] > PROBE_SECONDS:
            break
        if runs(2 * good):
            good *= 2
        else:
            bad = 2 * good
    if bad is None:
        return Detection(None, f"no limit found up to {good} tokens")
    # The size of some tensor is the limit more often than any other number between.
    for size in [size for size in likely if good <= size < bad]:
        if size >= bad or size < good or not runs(size):
            continue
        good = size
        if not runs(size + 1):
            bad = size + 1
            break
        good = size + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if runs(middle) else (good, middle)
    return Detection(good, f"found by trying: {good} tokens run, {bad} do not")
