"""The same task in three libraries, each the way its own guide goes about it.

Train on a folder of pictures, grey or RGB, made `size` x `size`; average the weights; keep
checkpoints; go on from the last one when started again; at the end draw 16 pictures into one PNG.

    python -m benchmarks.users.ours pictures out          # or diffusers_, or lucidrains
"""

import tokenize
from pathlib import Path

PROGRAMS = dict(ours="ours.py", diffusers="diffusers_.py", lucidrains="lucidrains.py")


def code_lines(path):
    "Lines that hold code: no blank lines, no comments, no docstrings."
    ignored = (tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    lines, statement = set(), []
    with open(path, "rb") as f:
        for token in tokenize.tokenize(f.readline):
            if token.type == tokenize.NEWLINE:
                if any(part.type != tokenize.STRING for part in statement):
                    for part in statement:
                        lines |= set(range(part.start[0], part.end[0] + 1))
                statement = []
            elif token.type not in ignored:
                statement.append(token)
    return len(lines)


def lines():
    "The lines of code of each program."
    return {side: code_lines(Path(__file__).parent / name) for side, name in PROGRAMS.items()}
