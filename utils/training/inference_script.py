"""Run this model with one package: onnxruntime (which brings numpy), or torch where the settings say so.

    python inference.py --check                    compare with the numbers that the original model gave
    python inference.py "Once upon" --tokens 50    continue a text (causal language models)
    python inference.py --inputs inputs.json       any model: a JSON object of inputs as nested lists; prints logits

From Python: ``Model(folder).logits({"input_ids": [[1, 2, 3]]})``. The settings are in inference.json.
"""

import argparse
import itertools
import json
import math
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SPACES = set("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(n) for n in range(0x2000, 0x200B)}
CONTRACTIONS = re.compile("'(?:s|t|re|ve|m|ll|d)")
SHAPES = re.compile("_?L+|_?N+|_?O+|[S_]+(?![LNO])|[S_]+")


class Model:
    """The exported model, on the CPU."""

    def __init__(self, folder: str | Path | None = None) -> None:
        """Open the file that the settings name."""
        folder = Path(folder) if folder else Path(__file__).resolve().parent
        self.settings = json.loads((folder / "inference.json").read_text(encoding="utf-8"))
        path = str(folder / self.settings["file"])
        self._array: Callable[[Any, str], Any]
        self._run: Callable[[dict[str, Any]], Any]
        if self.settings["runtime"] == "onnxruntime":
            import numpy
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            taken = {node.name for node in session.get_inputs()}
            self._array = lambda value, dtype: numpy.asarray(value, dtype=dtype)
            self._run = lambda arrays: session.run(None, {n: a for n, a in arrays.items() if n in taken})[0]
        else:
            import torch

            module = torch.export.load(path).module()
            self._array = lambda value, dtype: torch.tensor(value, dtype=getattr(torch, dtype))

            def run(arrays: dict[str, Any]) -> Any:
                with torch.no_grad():
                    return module(*arrays.values()).float()

            self._run = run
        tokenizer = folder / "tokenizer.json"
        self.tokenizer = Tokenizer(tokenizer) if tokenizer.exists() else None

    def logits(self, inputs: dict[str, Any]) -> Any:
        """Return the logits as an array for inputs given as nested lists; masks and positions are filled in."""
        arrays = {}
        main = self.settings["inputs"][0]["name"]
        for entry in self.settings["inputs"]:
            name = entry["name"]
            if name in inputs:
                value = inputs[name]
            elif entry["fill"] == "positions":
                value = [list(range(len(row))) for row in inputs[main]]
            elif entry["fill"] in ("ones", "zeros"):
                value = [[int(entry["fill"] == "ones")] * len(row) for row in inputs[main]]
            else:
                raise SystemExit(
                    f"The input {name!r} is missing; expected {[e['name'] for e in self.settings['inputs']]}."
                )
            arrays[name] = self._array(value, entry["dtype"])
        return self._run(arrays)

    def next_logits(self, ids: list[int]) -> list[float]:
        """Return the logits of the next token as a list, from the last ids that fit."""
        limit, fixed = self.settings["max_length"], self.settings["fixed_shape"]
        main = self.settings["inputs"][0]["name"]
        ids = ids[-limit:] if limit else ids
        rows, length = fixed or (1, -(-len(ids) // self.settings["multiple"]) * self.settings["multiple"])
        # What comes after a token changes nothing at it, so a short text is filled up behind.
        ids = ids[-length:]
        row = ids + [0] * (length - len(ids))
        return list(self.logits({main: [row] * rows})[0][len(ids) - 1].tolist())

    def generate(self, prompt: Any, tokens: int = 50, temperature: float = 0.8, top_k: int = 50, seed: int = 0) -> Any:
        """Continue a text, or a list of ids; returns the new part in the same form."""
        if self.settings["task"] != "causal_lm":
            raise SystemExit(f"This model is for {self.settings['task']}; it continues no text.")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise SystemExit("There is no tokenizer.json beside this script; give token ids.")
            ids = self._continued(self.tokenizer.encode(prompt), tokens, temperature, top_k, seed)
            return self.tokenizer.decode(ids)
        return self._continued(list(prompt), tokens, temperature, top_k, seed)

    def _continued(self, ids: list[int], tokens: int, temperature: float, top_k: int, seed: int) -> list[int]:
        end = self.settings["end_id"]
        if not ids:
            if end is None:
                raise SystemExit("The prompt is empty; give at least one token.")
            ids = [end]
        start, chance = len(ids), random.Random(seed)
        for _ in range(tokens):
            token = draw(self.next_logits(ids)[: self.settings["vocabulary"]], temperature, top_k, chance)
            if token == end:
                break
            ids.append(token)
        return ids[start:]


def draw(logits: list[float], temperature: float, top_k: int, chance: random.Random) -> int:
    """Draw one id."""
    order = sorted(range(len(logits)), key=lambda number: -logits[number])
    if temperature == 0:
        return order[0]
    order = order[:top_k] if top_k else order
    weights = [math.exp((logits[number] - logits[order[0]]) / temperature) for number in order]
    return chance.choices(order, weights)[0]


class Tokenizer:
    """Byte-level BPE and characters without any package; other tokenizers need the package tokenizers."""

    def __init__(self, path: Path) -> None:
        """Read a tokenizer.json."""
        known = json.loads(Path(path).read_text(encoding="utf-8"))
        model, before = known["model"], known.get("pre_tokenizer") or {}
        self.library: Any = None
        plain = known.get("normalizer") is None
        usual = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        simple = not any(model.get(name) for name in ("dropout", "ignore_merges", "continuing_subword_prefix"))
        cut = {name: value for name, value in before.items() if name != "trim_offsets"}
        self.bytes = plain and model["type"] == "BPE" and cut == usual and simple
        characters = plain and model["type"] == "WordLevel" and before.get("pattern") == {"Regex": r"[\s\S]"}
        if not (self.bytes or characters):
            try:
                from tokenizers import Tokenizer as Library
            except ImportError:
                raise SystemExit("This model's tokenizer needs one more package: pip install tokenizers") from None
            self.library = Library.from_str(Path(path).read_text(encoding="utf-8"))
            self.library.encode_special_tokens = True
            return
        self.special = {entry["id"] for entry in known["added_tokens"] if entry["special"]}
        self.ids, self.unknown = model["vocab"], model.get("unk_token")
        self.names = {number: name for name, number in self.ids.items()}
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [number for number in range(256) if number not in printable]
        self.letters = {n: chr(n) for n in printable} | {n: chr(256 + place) for place, n in enumerate(others)}
        self.numbers = {letter: number for number, letter in self.letters.items()}
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        if self.library is not None:
            return list(self.library.encode(text, add_special_tokens=False).ids)
        if not self.bytes:
            return [self.ids.get(letter, self.ids[self.unknown]) for letter in text]
        return [number for word in words(text) for number in self._word(word)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special ones left out."""
        if self.library is not None:
            return str(self.library.decode(ids, skip_special_tokens=True))
        names = [self.names[number] for number in ids if number not in self.special]
        if not self.bytes:
            return "".join(names)
        return bytes(self.numbers[letter] for letter in "".join(names)).decode("utf-8", "replace")

    def _word(self, word: str) -> list[int]:
        if word not in self.cache:
            parts = [self.letters[number] for number in word.encode("utf-8")]
            while len(parts) > 1:
                pairs = enumerate(itertools.pairwise(parts))
                rank, place = min((self.ranks.get(pair, math.inf), at) for at, pair in pairs)
                if rank == math.inf:
                    break
                parts[place : place + 2] = [parts[place] + parts[place + 1]]
            self.cache[word] = [self.ids[part] for part in parts]
        return self.cache[word]


def words(text: str) -> Iterator[str]:
    """Split a text as byte-level BPE does: contractions, letters, numbers, others, white space."""

    def kind(letter: str) -> str:
        if letter in SPACES:
            return "_" if letter == " " else "S"
        major = unicodedata.category(letter)[0]
        return major if major in "LN" else "O"

    shape, place = "".join(map(kind, text)), 0
    while place < len(text):
        match = CONTRACTIONS.match(text, place) or SHAPES.match(shape, place)
        assert match is not None, "every kind of character is in one of the patterns"
        yield text[place : match.end()]
        place = match.end()


def flat(values: Any) -> list[Any]:
    """Return the numbers of nested lists in one list."""
    return [number for value in values for number in flat(value)] if isinstance(values, list) else [values]


def check(folder: str | Path | None = None) -> tuple[float, bool]:
    """Return the largest difference from the original's answers in check.json, and whether all is well."""
    folder = Path(folder) if folder else Path(__file__).resolve().parent
    known = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    model = Model(folder)
    found = flat(model.logits(known["inputs"]).tolist())
    pairs = zip(found[:: known["stride"]], map(float, known["logits"]), strict=True)
    largest = max(0.0 if a == b else abs(a - b) for a, b in pairs)
    good = len(found) == known["count"] and largest <= known["tolerance"]
    for text, ids in known["texts"]:
        good = good and model.tokenizer is not None and model.tokenizer.encode(text) == ids
    return largest, good


def say(text: str) -> None:
    """Write a line."""
    sys.stdout.write(text + "\n")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Run the exported model.")
    parser.add_argument("prompt", nargs="?", help="text to continue")
    parser.add_argument("--check", action="store_true", help="compare with the original model's numbers")
    parser.add_argument("--inputs", help="JSON file with the inputs; prints the logits as JSON")
    parser.add_argument("--tokens", type=int, default=50, help="how many tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="draw from so many of the likeliest; 0 from all")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    options = parser.parse_args()
    if options.check:
        largest, good = check()
        say(json.dumps({"difference": largest, "good": good}))
        return 0 if good else 1
    if options.inputs:
        inputs = json.loads(Path(options.inputs).read_text(encoding="utf-8"))
        say(json.dumps(Model().logits(inputs).tolist()))
        return 0
    if options.prompt is None:
        parser.print_help()
        return 2
    say(options.prompt + Model().generate(
        options.prompt, options.tokens, options.temperature, options.top_k, options.seed
    ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
