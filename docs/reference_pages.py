#!/usr/bin/env python3
"""Writes README.md, docs/*.md and the other pages into a folder, for Doxygen: docs/reference_pages.py FOLDER.

Doxygen gives headings other anchors than Markdown sites do, so each gets the one that links use, unique to its page,
and links between pages are written as references to these. Links to files of the sources become their names.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)]*)\)")


def label(page):
    """What Doxygen knows a page as."""
    return "page_" + re.sub(r"\W", "_", str(page.relative_to(ROOT).with_suffix("")))


def anchor(heading):
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def outside_of_code(text, change):
    """`change` applied to what does not stand between backticks; a link's text may have some."""
    parts = re.split(r"(\[[^\]]*\]\([^)]*\)|`[^`]*`)", text)
    return "".join(change(part) if not part.startswith("`") else part for part in parts)


def converted(page):
    def link(match):
        bang, text, target = match[1], " ".join(match[2].split()), match[3]
        if re.match("[a-z]+:", target):
            return match[0]
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if bang:
            return f"![{text}]({file.name})"
        if file not in PAGES:
            return text
        name = label(file) + ("_" + heading.replace("-", "_") if heading else "")
        return f'\\ref {name} "{text.replace("`", "")}"'

    lines, paragraph, code, first = [], [], False, True

    def end_paragraph():
        text = outside_of_code("\n".join(paragraph), lambda part: LINK.sub(link, part))
        lines.extend(text.split("\n") if paragraph else [])
        paragraph.clear()

    for line in page.read_text().splitlines():
        code = code != line.startswith("```")
        heading = re.match("(#+) (.*)", line)
        if code or line.startswith(("```", "    ")) or not line or heading:
            end_paragraph()
            if heading and not code:
                name = label(page) + ("" if first else "_" + anchor(heading[2]).replace("-", "_"))
                line, first = f"{line.replace('`', '')} {{#{name}}}", False
            lines.append(line)
        else:
            paragraph.append(line)
    end_paragraph()
    return "\n".join(lines) + "\n"


def main():
    folder = pathlib.Path(sys.argv[1])
    for page in PAGES:
        # README.md of the root is the main page, by its name.
        name = "README.md" if page.parent == ROOT and page.stem == "README" else label(page) + ".md"
        (folder / name).write_text(converted(page))


if __name__ == "__main__":
    main()
