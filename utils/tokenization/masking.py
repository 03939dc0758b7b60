"""BERT's masking: 15% of the tokens are to be guessed; of these 80% are hidden, 10% replaced, 10% left as they are."""

from collections.abc import Iterable

import torch
from torch import Tensor

from utils.adapters.objectives import IGNORED
from utils.runtime.errors import DataError


def mask_tokens(
    input_ids: Tensor,
    mask_id: int,
    vocab_size: int,
    special_ids: Iterable[int] = (),
    *,
    seed: int | torch.Generator = 0,
    probability: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Mask a batch for masked language modelling, the same way for the same seed.

    Args:
        input_ids: Token ids, shape (batch, length). Left untouched.
        mask_id: Id of the mask token.
        vocab_size: Number of legal ids.
        special_ids: Ids that are neither masked nor used as replacements.
        seed: A seed, or a generator to continue.
        probability: Share of the ordinary tokens that are to be guessed.

    Returns:
        Inputs with masks and labels that are `IGNORED` wherever nothing is to be guessed, both of the shape of
        `input_ids`. At least one token is to be guessed as long as the batch holds an ordinary token, so that the mean
        loss is never that of an empty set.

    Raises:
        DataError: The mask id is outside the vocabulary, or no ordinary id is left.
    """
    excluded = sorted({*special_ids, mask_id})
    if not 0 <= mask_id < vocab_size or excluded[0] < 0 or excluded[-1] >= vocab_size:
        raise DataError(
            f"The special ids {excluded} (mask {mask_id}) do not fit a vocabulary of {vocab_size}.",
            f"Expected ids from 0 to {vocab_size - 1}.",
        )
    if len(excluded) == vocab_size:
        raise DataError(f"All {vocab_size} ids are special.", "Expected ordinary ids to mask.")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    # Drawn by the generator, on the CPU as a rule, so that a seed masks the same tokens on every machine.
    shape, source = input_ids.shape, generator.device
    chosen_draw = torch.rand(shape, generator=generator, device=source).to(input_ids.device)
    kind = torch.rand(shape, generator=generator, device=source).to(input_ids.device)
    draw = torch.randint(vocab_size - len(excluded), shape, generator=generator, device=source).cpu()
    usable = torch.ones(vocab_size, dtype=torch.bool)
    usable[excluded] = False
    replacement = usable.nonzero()[:, 0][draw].to(input_ids.device, input_ids.dtype)

    ordinary = usable.to(input_ids.device)[input_ids]
    chosen = ordinary & (chosen_draw < probability)
    if not chosen.any():
        lowest = torch.where(ordinary, chosen_draw, torch.inf).flatten().argmin()
        chosen = torch.zeros_like(chosen)
        chosen.view(-1)[lowest] = True
        chosen &= ordinary
    inputs = torch.where(chosen & (kind < 0.8), mask_id, input_ids)
    inputs = torch.where(chosen & (kind >= 0.8) & (kind < 0.9), replacement, inputs)
    return inputs, torch.where(chosen, input_ids, IGNORED)
