"""The limits of the design, read from the source: who imports whom, and how long a thing may become.

A check returns what is wrong with a source, as text. Each is shown a made-up source that it must not pass.
"""

import ast
import re

import pytest
from conftest import ROOT

import steps

STORY = (ROOT / "finetune_vit.py").read_text(encoding="utf-8")
ROOMS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "steps").glob("[!_]*.py"))}
ORDER = re.findall(r"\w+", re.search(r"in this list:(.+)\.", steps.__doc__, re.S)[1])


def imports(source):
    """Return the modules that a source imports, wherever it does; rooms as steps.NAME."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["steps" if node.level else "", node.module]))
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "steps" else {module}
    return found


def wrong_imports(name, source, order):
    """Say which rooms do not stand before `name` in `order`, and whether the story is imported."""
    rooms = {module.split(".")[1] for module in imports(source) if module.startswith("steps.")}
    return sorted(rooms - set(order[: order.index(name)])) + imports_of_story(source)


def imports_of_story(source):
    return [module for module in imports(source) if module.split(".")[0] == "finetune_vit"]


def long_functions(source, lines=40, parameters=4):
    """Say which functions are longer than `lines` or take more than `parameters`, without self and *, **."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            named = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in named if name not in ("self", "cls")])
            wrong += [f"{node.name}: {length} lines"] if length > lines else []
            wrong += [f"{node.name}: {count} parameters"] if count > parameters else []
    return wrong


def cells(source):
    """Return the cells of a script as (whether it is Markdown, its lines without blank ones at the end)."""
    parts = re.split(r"^# %%(.*)\n", source, flags=re.M)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [("[markdown]" in kind, text.rstrip().splitlines()) for kind, text in pairs]


def long_cells(source, code=45, prose=10):
    """Say which cells have more lines; titles, tables and blank lines are no prose."""
    wrong = []
    for markdown, lines in cells(source):
        text = [line for line in lines if not re.fullmatch(r"#( #.*| \|.*)?", line)] if markdown else lines
        if len(text) > (prose if markdown else code):
            wrong.append(f"{lines[0]}: {len(text)} lines")
    return wrong


def missing_calls(source):
    """Say what a reader would look for in the story and not find."""
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    wanted = """load_dataset AutoImageProcessor.from_pretrained
    AutoModelForImageClassification.from_pretrained Trainer trainer.train pipeline"""
    return [name for name in wanted.split() if name not in calls]


def steps_with(name, source):
    """Return the titles of the steps whose code assigns `name`."""
    title, found = None, []
    for markdown, lines in cells(source):
        title = lines[0].removeprefix("# ## ") if markdown and lines[0].startswith("# ## ") else title
        for node in () if markdown else ast.parse("\n".join(lines)).body:
            if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
                found.append(title)
    return found


def test_the_list_of_rooms_is_whole():
    """In the docstring of steps/__init__.py, each of them once."""
    assert sorted(ORDER) == sorted(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_rooms_before_it(name):
    assert wrong_imports(name, ROOMS[name], ORDER) == []


def test_imports_that_break_the_order_are_seen():
    order = ["low", "middle", "high"]
    for line, wrong in {
        "from .high import x": ["high"],
        "from . import high": ["high"],
        "import steps.high": ["high"],
        "from steps.high import x": ["high"],
        "from steps import high, low": ["high"],
        "from .middle import x": ["middle"],
        "def f():\n    from .high import x": ["high"],
        "from .unknown import x": ["unknown"],
        "import finetune_vit": ["finetune_vit"],
        "from finetune_vit import RECIPES": ["finetune_vit"],
        "from .low import x": [],
        "import high": [],
    }.items():
        assert wrong_imports("middle", line, order) == wrong, line


def test_nothing_imports_the_story():
    """It would run from top to bottom."""
    files = [path for folder in ("steps", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 40
    assert [str(path) for path in files if imports_of_story(path.read_text(encoding="utf-8"))] == []


def test_rooms_and_their_functions_are_small():
    assert {name: len(text.splitlines()) for name, text in ROOMS.items() if text.count("\n") > 250} == {}
    assert {name: wrong for name, text in ROOMS.items() if (wrong := long_functions(text))} == {}


def test_functions_that_are_too_large_are_seen():
    body = "    pass\n" * 39
    assert long_functions(f"def f():\n{body}") == []
    assert long_functions(f"def f():\n{body}    pass\n") == ["f: 41 lines"]
    assert long_functions("def f(a, b, c, d, *e, **g): ...\nclass K:\n def m(self, a, b, c, d): ...") == []
    for parameters in ("a, b, c, d, e", "a, b, c, d, *, e", "a, /, b, c, d, e"):
        assert long_functions(f"class K:\n  async def f({parameters}): ...") == ["f: 5 parameters"]


def test_the_story_and_its_cells_are_short():
    assert len(STORY.splitlines()) <= 350
    assert long_cells(STORY) == [] and long_functions(STORY) == []
    assert len(cells(STORY)) == STORY.count("# %%") > 25


def test_cells_that_are_too_long_are_seen():
    title, table = "# %% [markdown]\n# ## 1 · Title\n#\n", "# | a | b |\n"
    assert long_cells(title + table * 20 + "# text\n" * 10 + "\n# %%\n" + "x = 1\n" * 45) == []
    assert long_cells(title + "# text\n" * 11) == ["# ## 1 · Title: 11 lines"]
    assert long_cells(title + "# text\n" + "\n# %%\n" + "x = 1\n" * 46) == ["x = 1: 46 lines"]


def test_what_a_reader_looks_for_stands_in_the_story():
    assert missing_calls(STORY) == []
    assert steps_with("RECIPES", STORY) == ["0 · Settings"]
    assert steps_with("REPOSITORY", STORY) == [None]


def test_what_has_left_the_story_is_missed():
    hidden = STORY.replace("trainer.train(", "train(").replace("load_dataset(", "read(")
    assert missing_calls(hidden) == ["load_dataset", "trainer.train"]
    assert "pipeline" in missing_calls(STORY.replace("= pipeline(", "= make("))
    later = "# %% [markdown]\n# ## 0 · A\n\n# %%\nx = 1\n\n# %% [markdown]\n# ## 1 · B\n\n# %%\nRECIPES = 1\n"
    assert steps_with("RECIPES", later) == ["1 · B"] and steps_with("RECIPES", "# %%\nx = {}") == []
