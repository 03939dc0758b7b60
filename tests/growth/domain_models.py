"""Two domains of real text, and a small language model that reads them."""

import random
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F

import utils

LETTERS = "abcdefghijklmnopqrstuvwxyz .,;:'!?-()"
LENGTH = 32
SCENES = (
    "o gentle night, thou dost conceal my grief;",
    "what light is this that breaks upon the wall?",
    "good my lord, the duke hath ta'en his leave,",
    "and with him went the honour of this house.",
    "nay, sirrah, speak no more of crowns and kings!",
    "my sword is rust, my horse is lame, i yield.",
    "fair maid, wilt thou forgive a soldier's oath?",
    "the moon, pale witness, weeps upon the sea;",
    "alas, poor fool! thy master sleeps in earth.",
    "come, bring the wine, and let the minstrel play;",
    "i'll to the wood, where thieves are honest men.",
    "hark! hear'st thou not the drum of angry clouds?",
)


def windows(text, count, seed=0):
    """Cut a text into pieces that have nothing in common, shuffle them and return ``(count, LENGTH)`` ids."""
    kept = "".join(letter for letter in " ".join(text.lower().split()) if letter in LETTERS)
    ids = torch.tensor([LETTERS.index(letter) for letter in kept])
    pieces = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[:count]]


def docs(count=200):
    """Pieces of Python's documentation."""
    return windows(" ".join(topics[name] for name in sorted(topics)), count)


def plays(count=200, lines=SCENES):
    """Pieces of speeches, whose lines come in any order."""
    order = random.Random(0)
    return windows(" ".join(" ".join(order.sample(lines, len(lines))) for _ in range(60)), count)


def gpt(layers=2, width=64):
    """The small GPT of the examples, its head tied to its embedding."""
    config = {"vocab_size": len(LETTERS), "d_model": width, "nhead": 4, "num_layers": layers, "dropout": 0.0}
    return utils.load_model("example:gpt", config=config)


def loss_of(model, ids, **also):
    """Mean loss of the next letter in nats."""
    logits = model(ids[:, :-1], **also)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def train(model, ids, steps=60, seed=0, rate=3e-3, **also):
    """Train what is not frozen, in a plain loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        loss = loss_of(model, ids[torch.randint(len(ids), (16,), generator=generator)], **also)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return model


@torch.no_grad()
def answer(model, ids, **also):
    """What a model answers in eval mode."""
    return model.eval()(ids, **also)
