#!/usr/bin/env python3
"""Checks that docs/troubleshooting.md has an entry for every message of microreg and of the CIFAR trainer.

    tests/check_messages.py           checks, and names the messages that are missing and where they stand
    tests/check_messages.py --list    prints what is looked for

Messages are the texts of errors (whatever is constructed with a name that ends in Error, and every `throw`) and of the
reasons that they give, of warnings, static_asserts and #errors, of the problems and notes of verify(), what CMake says of
the package, and what the scripts fail with that set everything up. They are made of pieces, words and values: the first
piece of words and the longest one, or of each the first 48 characters, must stand in one heading or line of code of the
page. An entry that belongs to no message any more is an error too.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
KEY_LENGTH = 48
SHORTEST = 8  # letters and spaces that make a piece one of words
SHORTEST_OWN = 24  # of a message that passes another one on: with less it adds only where that arose

COMMENT_OR_LITERAL = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)
CALL = re.compile(
    r"\b(?:throw\s+\w[\w:]*|\w*(?:Error|_error)|static_assert|problem|note|fail|TORCH_CHECK"
    r"|TORCH_WARN(?:_ONCE)?|failure_\.emplace)\s*\(|#error\b|\b(?:why|cause)\s*=(?!=)"
)
CMAKE = re.compile(r'set\(microreg_(?:missing|NOT_FOUND_MESSAGE)\s+("(?:\\.|[^"\\])*")')
SCRIPT = re.compile(r'microreg_fail\s+("(?:\\.|[^"\\])*")')
VALUE = re.compile(r"\{[^{}]*\}")  # where fmt puts one
ESCAPES = {"n": " ", "t": " ", '"': '"', "\\": "\\", "'": "'"}


def without_comments(text):
    return COMMENT_OR_LITERAL.sub(lambda m: m[0] if m[0][0] in "\"'" else " " * 1 + "\n" * m[0].count("\n"), text)


def arguments(text, opening):
    """What stands between the parenthesis at `opening` and its partner."""
    depth, position = 0, opening
    while position < len(text):
        literal = COMMENT_OR_LITERAL.match(text, position)
        if literal:
            position = literal.end()
            continue
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        position += 1
        if depth == 0:
            return text[opening + 1 : position - 1]
    raise ValueError("a parenthesis is not closed")


def pieces(expression):
    """The literals of an expression, those that follow each other as one, without the places of fmt's values."""
    joined = re.sub(r'(?<!\\)"\s*"', "", expression)
    for literal in re.findall(r'"((?:\\.|[^"\\\n])*)"', joined):
        words = re.sub(r"\\(.)", lambda m: ESCAPES.get(m[1], m[1]), literal)
        for piece in VALUE.split(words):
            piece = " ".join(piece.split())
            if len(re.sub("[^A-Za-z ]", "", piece)) >= SHORTEST:
                yield piece


def cut(piece):
    return piece if len(piece) <= KEY_LENGTH else piece[:KEY_LENGTH].rsplit(" ", 1)[0]


def key_of(expression):
    """(first piece, longest piece) of a message, or None where it has no words of its own."""
    found = list(pieces(expression))
    longest = max(found, key=len, default="")
    if not longest or (".what" in expression and len(longest) < SHORTEST_OWN):
        return None
    return cut(found[0]), cut(longest)


def messages():
    """{key: [place, ...]}"""
    found = {}

    def add(file, text, position, expression):
        key = key_of(expression)
        if key:
            line = text.count("\n", 0, position) + 1
            found.setdefault(key, []).append(f"{file.relative_to(ROOT)}:{line}")

    files = [*(ROOT / "include").rglob("*.hpp"), *(ROOT / "examples" / "cifar").glob("*.?pp")]
    for file in sorted(files):
        text = without_comments(file.read_text())
        for call in CALL.finditer(text):
            if call[0].startswith("#"):
                rest = re.match(r'[\s\\]*(".*")', text[call.end() :])[1]
            elif call[0].endswith("="):
                rest = re.match(r'(?:"(?:\\.|[^"\\])*"|[^";])*', text[call.end() :])[0]
            else:
                rest = arguments(text, call.end() - 1)
            add(file, text, call.start(), rest)
    for pattern, message in (("cmake/*.cmake*", CMAKE), ("cmake/*.sh", SCRIPT), ("examples/*.sh", SCRIPT)):
        for file in sorted(ROOT.glob(pattern)):
            text = file.read_text()
            for said in message.finditer(text):
                add(file, text, said.start(), re.sub(r"\$(?:\{[^}]*\}|\w+|\*)", "{}", said[1]).replace("\n", " "))
    return found


def entries():
    """The headings with code and the lines of code of the page."""
    code, result = False, []
    for line in PAGE.read_text().splitlines():
        if line.startswith("```"):
            code = not code
        elif code or line.startswith("    ") or (line.startswith("#") and "`" in line):
            result.append(" ".join(line.replace("`", "").lstrip("#").split()))
    return result


def main():
    found = messages()
    if "--list" in sys.argv[1:]:
        for key, places in sorted(found.items(), key=lambda item: item[1]):
            print(f"{places[0]}: {' ... '.join(dict.fromkeys(key))}")
        return 0
    if len(found) < 100:
        print(f"only {len(found)} messages were found in {ROOT}: are the sources there?")
        return 1
    lines = entries()

    def is_in(key, line):
        return all(part in line for part in key)

    missing = {key: places for key, places in found.items() if not any(is_in(key, line) for line in lines)}
    stale = [line for line in lines if not any(is_in(key, line) for key in found)]
    for key, places in missing.items():
        print(f"{places[0]}: docs/troubleshooting.md has no entry with {' and '.join(map(repr, dict.fromkeys(key)))}")
    for line in stale:
        print(f'docs/troubleshooting.md: "{line}" is in no message')
    print(f"{len(found)} messages, {len(missing)} without an entry; {len(lines)} entries, {len(stale)} without a message")
    return 1 if missing or stale else 0


if __name__ == "__main__":
    sys.exit(main())
