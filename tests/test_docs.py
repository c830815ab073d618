"""The documentation runs: every Python block of a page, in order, in one namespace; and every public name has
its entry.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

import numpyro_rtk as rtk


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN: set[tuple[str, str]] = set()  # (page, reason) of each block behind a `<!-- not run: reason -->`

_BLOCK = re.compile(
    r"(?:^[ \t]*<!-- not run: (?P<reason>[^\n]*?) -->[ \t]*\n)?"
    r"^(?P<indent>[ \t]*)```[ \t]*python[^\n]*\n(?P<code>.*?)^(?P=indent)```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    line: int  # of the page, where the code starts
    code: str
    reason: str | None  # why it is not run


def python_blocks(text):
    blocks = []
    for match in _BLOCK.finditer(text):
        indent, code = match["indent"], match["code"]
        code = "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))
        blocks.append(Block(text.count("\n", 0, match.start("code")) + 1, code, match["reason"]))
    return blocks


def name_of(page):
    return page.relative_to(ROOT).as_posix()


PAGES_WITH_CODE = [page for page in PAGES if python_blocks(page.read_text(encoding="utf-8"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in python_blocks(page.read_text(encoding="utf-8")):
        if block.reason is None:
            # Blank lines in front make tracebacks point at the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


def test_only_expected_blocks_are_not_run():
    found = {
        (name_of(page), block.reason)
        for page in PAGES
        for block in python_blocks(page.read_text(encoding="utf-8"))
        if block.reason is not None
    }
    assert found == NOT_RUN


def test_every_fence_that_opens_python_is_collected():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(
            r"^[ \t]*(?:`{3,}|~{3,})[ \t]*(?:py|python|python3|pycon)\b", text, re.MULTILINE | re.IGNORECASE
        )
        assert len(fences) == len(python_blocks(text)), name_of(page)


def test_blocks_are_found_with_their_line_indent_and_reason():
    first = "a\n<!-- not run: needs a GPU -->\n```python\nx = 1\n```\n\n"
    text = first + "- b\n\n    ```python\n    if x:\n        y = 2\n    ```\n"
    assert python_blocks(text) == [Block(4, "x = 1\n", "needs a GPU"), Block(10, "if x:\n    y = 2\n", None)]


def public_names():
    return {name for name in vars(rtk) if not name.startswith("_")} - {"annotations"}


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = re.findall(r"^::: numpyro_rtk\.(\w+)$", text, re.MULTILINE)
    assert len(documented) == len(set(documented)), "a name has two entries"
    public = {name for name in documented if not name.startswith("_")}
    assert public == public_names()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"^ +- [^:\n]+: (\S+\.md)$", navigation, re.MULTILINE))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.parent != ROOT}


def test_messages_quoted_in_the_faq_exist():
    """A reader looks for the words of a message: they must be the same on the page and in the source."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "numpyro_rtk").rglob("*.py"))
    source = re.sub(r"\s+", " ", re.sub(r'"\s*\n\s*f?"', "", source))
    page = (ROOT / "docs" / "faq-errors.md").read_text(encoding="utf-8")
    for phrase in (
        "is not the score of its own draws",
        "has the wrong sign",
        "too long for",
        "does not resolve",
        "failed on one event",
        "returned NaN or infinity at its first call",
        "is another noising process than the one of `score_fn`",
        "must decrease strictly",
        "must be integer steps",
        "times that coincide",
        "needs a schedule with continuous time",
        "The state comes from a kernel with other network weights",
        "must have the single key",
        "Particle weights collapsed",
        "was differentiated with respect to something that its `score_fn`",
        "`density=ProbabilityFlow()` needs a schedule with continuous time",
        "`density=EnergyDensity()` needs a score with a method `energy(x, t)`",
        "needs a model with a latent `DiffusionPrior` site",
        "the model has other latent sites",
        "`inner_kernel` must be a NumPyro kernel",
        "cannot sample the discrete latent sites",
        "transforms a diffusion prior",
        "does not support plates that subsample",
        "does not support enumerated sites",
        "depends on latent",
        "mask or condition of observed diffusion site",
        "does not fit plate",
        "with a `Gibbs` among its blocks",
        "The log likelihood is -inf at all",
        "is NaN at every one",
        "`twist=GaussianTwist()` needs Gaussian observations",
        "gives the diffusion sites different numbers of levels",
    ):
        assert phrase in page, phrase
        assert phrase in source, phrase
