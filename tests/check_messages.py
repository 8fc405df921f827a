#!/usr/bin/env python3
"""Checks that docs/troubleshooting.md has an entry for every message of microreg and of the CIFAR trainer.

    tests/check_messages.py           checks, and names the messages that are missing and where they stand
    tests/check_messages.py --list    prints what is looked for

Messages are the texts of errors (whatever is constructed with a name that ends in Error, and every `throw`), of warnings,
static_asserts and #errors, of the problems and notes of verify(), what CMake says of the package, and what scripts fail
with. In the library and the trainer every other sentence is one too, however it gets into an error or a note: put
together, a plain string, or an alternative within a message. They are made of pieces, words and values: the first piece
of words and the longest one, or of each the first 48 characters, must stand in one heading or line of code of the page.
An entry that belongs to no message any more is an error too. Left out is what tests and the benchmarks' programs say.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
KEY_LENGTH = 48
SHORTEST = 8  # letters and spaces that make a piece one of words
SHORTEST_OWN = 24  # of a message that passes another one on: with less it adds only where that arose
SENTENCE = 4  # words in a row, which a name or the end of something else does not have

# What these say, but for their errors, is how things are: options, progress, and what verify() has found (docs/verify.md).
NO_SENTENCES = {
    "examples/cifar/command_line.cpp",
    "examples/cifar/progress.cpp",
    "include/microreg/definitions/verification.hpp",
}

LITERAL = r'"(?:\\.|[^"\\\n])*"'
COMMENT_OR_LITERAL = re.compile(rf"//[^\n]*|/\*.*?\*/|{LITERAL}|'(?:\\.|[^'\\\n])*'", re.S)
CALL = re.compile(
    r"\b(?:throw\s+\w[\w:]*|\w*(?:Error|_error)|static_assert|problem|note|fail|TORCH_CHECK"
    r"|TORCH_WARN(?:_ONCE)?|failure_\.emplace|notes\.push_back)\s*\(|#error\b|\b(?:why|cause|message)\s*=(?!=)"
)
PUT_TOGETHER = re.compile(r"\b(?:text|fmt::format)\s*\(")
STRING = re.compile(rf"(\b(?:find|has)\(|[?:])?\s*({LITERAL}(?:\s*{LITERAL})*)")  # with what tells its use before it
SCHEMA = re.compile(r"aten::|Tensor \w+,")  # of an operation of LibTorch
CMAKE = re.compile(r'set\(microreg_(?:missing|NOT_FOUND_MESSAGE)\s+"((?:\\.|[^"\\])*)"')
# What a function that fails is given, and what else begins with "error:" or says FAILED.
SCRIPT = re.compile(
    r"""(?:\b(?:microreg_fail|fail|misuse)\s+|\s(?=["'](?:error:|[^"'\n]*\bFAILED\b)))(["'])(?P<said>(?:\\.|(?!\1).)*)\1""",
    re.S,
)
SCRIPT_VALUE = re.compile(r"\$(?:\{[^}]*\}|\([^)]*\)|\w+|[*@])|%s")
PYTHON = re.compile(rf"\b(?:sys\.exit|\w*Error|note|print)\(f?({LITERAL})")
VALUE = re.compile(r"\{[^{}]*\}")  # where fmt, or Python, puts one
ESCAPES = {"n": " ", "t": " ", '"': '"', "\\": "\\", "'": "'"}


def without_comments(text):
    """The same with blanks in the places of comments, so that all else stays where it is."""
    return COMMENT_OR_LITERAL.sub(lambda m: m[0] if m[0][0] in "\"'" else re.sub(r"[^\n]", " ", m[0]), text)


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
        words = re.sub(r"\\(.)", lambda m: ESCAPES.get(m[1], m[1]), literal).removeprefix("error: ")
        for piece in VALUE.split(words):
            piece = " ".join(piece.split())
            if len(re.sub("[^A-Za-z ]", "", piece)) >= SHORTEST:
                yield piece


def is_sentence(expression):
    return any(
        len(re.findall(r"\S*[A-Za-z]\S*", piece)) >= SENTENCE and not SCHEMA.match(piece) for piece in pieces(expression)
    )


def cut(piece):
    return piece if len(piece) <= KEY_LENGTH else piece[:KEY_LENGTH].rsplit(" ", 1)[0]


def key_of(expression):
    """(first piece, longest piece) of a message, or None where it has no words of its own."""
    found = list(pieces(expression))
    longest = max(found, key=len, default="")
    if not longest or (".what" in expression and len(longest) < SHORTEST_OWN):
        return None
    return cut(found[0]), cut(longest)


def of_cpp(text):
    """(position, expression) of each error, warning, problem, .."""
    text = without_comments(text)
    for call in CALL.finditer(text):
        if call[0].startswith("#"):
            yield call.end(), re.match(r'[\s\\]*(".*")', text[call.end() :])[1]
        elif call[0].endswith("="):
            yield call.end(), re.match(rf'(?:{LITERAL}|[^";])*', text[call.end() :])[0]
        else:
            yield call.end(), arguments(text, call.end() - 1)


def of_cpp_and_sentences(text):
    """The same, and of every other sentence."""
    text = without_comments(text)
    errors = list(of_cpp(text))
    put_together = [(call.end(), arguments(text, call.end() - 1)) for call in PUT_TOGETHER.finditer(text)]
    yield from errors
    yield from ((position, expression) for position, expression in put_together if is_sentence(expression))
    inside = [range(position, position + len(expression)) for position, expression in errors + put_together]
    for string in STRING.finditer(text):
        position, before, expression = string.start(2), string[1] or "", string[2]
        if before.endswith("("):  # it is compared with what LibTorch says
            continue
        alternative = before != ""  # of which the message around it has only the first or the longest in its key
        if is_sentence(expression) and (alternative or not any(position in stretch for stretch in inside)):
            yield position, expression


def of_script(text):
    for message in SCRIPT.finditer(text):
        said = SCRIPT_VALUE.sub("{}", message["said"]).replace("\n", " ")
        yield message.start("said"), f'"{said}"'


def of_python(text):
    return ((message.start(), message[1]) for message in PYTHON.finditer(text) if is_sentence(message[1]))


def of_cmake(text):
    for message in CMAKE.finditer(text):
        yield message.start(), SCRIPT_VALUE.sub("{}", message[0])


SOURCES = {  # where messages are, and what finds them there
    "include/**/*.hpp": of_cpp_and_sentences,
    "examples/cifar/*.?pp": of_cpp_and_sentences,
    "examples/*.cpp": of_cpp,
    "examples/cifar/*.py": of_python,
    "cmake/*.cmake*": of_cmake,
    "cmake/*.sh": of_script,
    "docs/*.sh": of_script,
    ".ci/*": of_script,
    "examples/*.sh": of_script,
    "examples/cifar/*.sh": of_script,
    "packaging/*.sh": of_script,
    "tests/*.sh": of_script,
    "benchmarks/**/*.sh": of_script,
}


def messages():
    """{key: [place, ...]}"""
    found = {}
    for pattern, of_file in SOURCES.items():
        for file in sorted(ROOT.glob(pattern)):
            name, text = str(file.relative_to(ROOT)), file.read_text()
            for position, expression in (of_cpp if name in NO_SENTENCES else of_file)(text):
                key = key_of(expression)
                if key:
                    found.setdefault(key, []).append(f"{name}:{text.count(chr(10), 0, position) + 1}")
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
