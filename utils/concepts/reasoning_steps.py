"""The steps of a text that reasons aloud: lines, and sentences within long lines."""

import re
from collections.abc import Sequence

SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[^\s])")
"""Between two sentences; a number such as 3.5 has no white space behind its point."""


def split_steps(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Return the steps of a text as ranges of its tokens, in order, without gaps.

    A step ends at the end of a line, or of a sentence that others follow on the same line. Lines that hold nothing but
    white space belong to the step before them.

    Args:
        pieces: The text of each token.
    """
    text, ends = "".join(pieces), []
    for line in re.finditer(r"[^\n]*\n*", text):
        if not line.group():
            continue
        ends += [line.start() + match.end() for match in SENTENCE.finditer(line.group())]
        ends.append(line.end())
    steps: list[tuple[int, int]] = []
    begin, place, wanted = 0, 0, 0
    for number, piece in enumerate(pieces):
        place += len(piece)
        while wanted < len(ends) and ends[wanted] <= place:
            wanted += 1
            # A token that crosses a border belongs to the step in which it begins.
            if "".join(pieces[begin : number + 1]).strip():
                steps.append((begin, number + 1))
                begin = number + 1
    if begin < len(pieces):
        if steps and not "".join(pieces[begin:]).strip():
            steps[-1] = (steps[-1][0], len(pieces))
        else:
            steps.append((begin, len(pieces)))
    return steps
