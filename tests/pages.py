"""The pages of the documentation: where they are, their blocks, and the commands they show."""

import re
import shlex
from typing import Dict, Iterator, List, Tuple

from conftest import REPO

PAGES = [REPO / "README.md", REPO / "MODEL_ZOO.md", *sorted((REPO / "docs").glob("*.md"))]
SHELLS = ("bash", "sh", "shell", "console")
_PROGRAMS = r"(?:\$ |python3? |pip3? |make |git |wget |curl |tools/\w+\.py )"


def fenced_blocks(page: str) -> List[Tuple[str, str]]:
    """(language, code) of every block of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def commands_of(page: str) -> Dict[str, List[str]]:
    """Commands by where they are: "block 1", ..., and "text" for those in backquotes.

    Raises:
        AssertionError: there are some in a block of another language.
    """
    found: Dict[str, List[str]] = {}
    for number, (language, code) in enumerate(fenced_blocks(page), start=1):
        if language in SHELLS:
            found[f"block {number}"] = list(_commands(code, has_prompts=language == "console"))
        else:
            hidden = re.search(f"^{_PROGRAMS}.*", code, re.MULTILINE)
            assert not hidden, f"a {language or 'plain'} block has the command {hidden[0]}"
    text = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    spans = [span for span in spans if re.match(_PROGRAMS, span)]
    spans = [f"python {span}" if span.startswith("tools/") else span for span in spans]
    found["text"] = [shlex.join(shlex.split(span)) for span in spans]
    return {place: commands for place, commands in found.items() if commands}


def _commands(code: str, has_prompts: bool = False) -> Iterator[str]:
    """One line for each command, without comments, quoted only where needed."""
    for line in code.replace("\\\n", " ").splitlines():
        if has_prompts and not line.startswith("$ "):
            continue  # what the command printed
        words = shlex.split(line[2 * has_prompts :], comments=True)
        if words:
            yield shlex.join(words)
