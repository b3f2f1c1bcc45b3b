"""What a page of the site is made of: a processed notebook as one that MyST-NB shows well, and the list of public names."""

import ast
import importlib
import inspect
import re
import tomllib
from html import escape
from pathlib import Path
from unicodedata import normalize
from uuid import uuid4

import yaml
from nbdev.showdoc import show_doc, showdoc_nm

from ddpm_nb._modidx import d as INDEX

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
REPO, HOST = PROJECT["urls"]["Repository"], PROJECT["urls"]["Documentation"]
COLAB = REPO.replace("https://github.com", "https://colab.research.google.com/github")


def public(name):
    """Whether no part of a name is private: nbdev documents none that are, and nothing links to one."""
    return not re.search(r"(^|\.)_(?!_)", name)


# "ddpm_nb.scheduler.NoiseScheduler.snr" -> "scheduler.html#noisescheduler.snr"; modules and what has no page of its own too
SYMBOLS = {
    name: url
    for table in INDEX["syms"].values()
    for name, (url, _) in table.items()
    if public(name)
}
MODULES = {
    next(iter(table.values()))[0].split(".html")[0]: module
    for module, table in INDEX["syms"].items()
}  # by page
SYMBOLS |= {module: f"{name}.html" for name, module in MODULES.items()}


def short(name):
    """`NoiseScheduler.snr` of `ddpm_nb.scheduler.NoiseScheduler.snr`."""
    return ".".join(name.split(".")[2:])


def names():
    """What may stand in backticks -> its URL: full and short names, and methods whose name (with a _ in it) is the only one."""
    table = dict(SYMBOLS) | {short(n): url for n, url in SYMBOLS.items() if short(n)}
    last = [n.split(".")[-1] for n in SYMBOLS if n.count(".") == 3]
    for name, url in SYMBOLS.items():
        method = name.split(".")[-1]
        if "_" in method and not method.startswith("_") and last.count(method) == 1:
            table.setdefault(method, url)
    return table


NAMES = names()


def unresolved(name):
    """Whether a name in backticks claims to be ours and is not: `ddpm_nb.x.y`, or `Class.member` of one of our classes."""
    if re.fullmatch(r"ddpm_nb(\.\w+)+", name):
        module, *rest = name.split(".")[1:]
        try:
            thing = importlib.import_module(f"ddpm_nb.{module}")
            for part in rest:
                thing = getattr(thing, part)
        except (ImportError, AttributeError):
            return True
        return False
    owner, _, member = name.partition(".")
    full = next((n for n in SYMBOLS if owner and short(n) == owner), None)  # `.item()` has no owner
    if not member or full is None or not re.fullmatch(r"\w+", member):
        return False
    cls = getattr(importlib.import_module(".".join(full.split(".")[:2])), owner)
    return not (hasattr(cls, member) or f"self.{member}" in inspect.getsource(cls))


def link_symbols(text, where):
    """Every name of ours in backticks becomes a link; one that looks like ours and is not is an error."""
    text = text.replace(f"]({HOST}", "](site:")  # those that nbdev has found
    text = re.sub(
        r"\[\[(`[^`]*`)\]\([^)]*\)\]\(", r"[\1](", text
    )  # in a link that the page wrote itself
    text = re.sub(r"\[(`[^`]*`)\]\(site:[^)#]*#(?:\w+\.)*_(?!_)\w+\)", r"\1", text)  # private ones

    def link(found):
        name = found[1].removesuffix("()")
        if unresolved(name):
            raise SystemExit(f"{where}: `{found[1]}` is not a name of this package")
        return f"[`{found[1]}`](site:{NAMES[name]})" if name in NAMES else found[0]

    return re.sub(r"(?<![\[`])`([\w.]+(?:\(\))?)`(?!`)", link, text)


def heading_id(words):
    """Sphinx's id of a heading, from the anchor that JupyterLab and GitHub use (its words joined by -)."""
    plain = normalize("NFKD", words).encode("ascii", "ignore").decode()  # no accents
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def markdown(text, files, where):
    """A cell's Markdown as MyST reads it: links to pages and symbols, callouts."""
    pieces = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)  # code fences stay as they are
    for i in range(0, len(pieces), 2):
        p = link_symbols(pieces[i], where)
        p = re.sub(
            r"\]\((\w+\.ipynb)(?:#([^)]+))?\)",
            lambda m: (
                f"](site:{files[m[1]]}.html{'#' + heading_id(m[2]) if m[2] else ''})"
                if m[1] in files
                else m[0]
            ),
            p,
        )
        p = re.sub(
            r"\]\(#([^)]+)\)", lambda m: f"](site:{files[where]}.html#{heading_id(m[1])})", p
        )
        p = p.replace("](../figures/", "](figures/").replace("](../design_docs/", "](design_docs/")
        p = re.sub(r"\]\(\.\./([\w./]+)\)", rf"]({REPO}/blob/main/\1)", p)
        p = re.sub(
            r"^\$\$(.+?)\$\$", r"\n$$\n\1\n$$\n\n", p, flags=re.M | re.S
        )  # a formula is its own paragraph
        pieces[i] = re.sub(
            r"^> \*\*(Note|Tip|Warning):\*\* ((?:.*\n?(?:^> ?.*\n?)*))",
            lambda m: (
                f":::{{{m[1].lower()}}}\n{re.sub(r'^> ?', '', m[2], flags=re.M).strip()}\n:::\n"
            ),
            p,
            flags=re.M,
        )
    return "".join(pieces)


def directives(source):
    """A code cell's `#| key: value` lines as a dict, and the rest of it."""
    lines = source.splitlines(keepends=True)
    found = dict(
        re.match(r"#\|\s*([\w-]+):?\s*(.*)", s).groups() for s in lines if s.startswith("#|")
    )
    return found, "".join(s for s in lines if not s.startswith("#|")).strip("\n")


def symbol_name(name):
    """A name as a heading shows it: a method's class is paler, and left out of the list of contents."""
    owner, dot, method = name.rpartition(".")
    return f"[`{owner}.`]{{.owner}}`{method}`" if dot else f"`{name}`"


def anchors(names, elsewhere=()):
    """What links to these names lead to: them and their methods, but for those with a heading elsewhere on the page."""
    inner = [
        short(n)
        for name in names
        for n in SYMBOLS
        if short(n).startswith(name + ".") and short(n) not in elsewhere
    ]
    return "".join(f'<a id="{n.lower()}"></a>' for n in (*names, *inner))


def symbol_heading(names, shown, elsewhere=()):
    """One heading for all that a cell defines, before its source, with the anchors that links use."""
    code = re.search(r"^\[source\]\((.*?)\)", shown[names[0]], re.M)[1]
    title = ", ".join(map(symbol_name, names))
    return f"### {title}\n\n{{.symbol}}\n{anchors(names, elsewhere)}[source]({code})"


def signature(shown):
    """The signature and the docstring from what `show_doc` gave, where no source follows."""
    found = re.search(r"^```python\n.*?^```", shown, re.M | re.S)
    said = shown[found.end() :].strip()
    return re.sub(r"__main__\.|torch\.(?=Tensor)", "", found[0]) + "\n\n" + said


def front_matter(nb):
    """Title, description and the page's name, from the first cell of a processed notebook."""
    return yaml.safe_load("".join(nb["cells"][0]["source"]).strip().strip("-"))


def cell(kind, source, **metadata):
    extra = dict(outputs=[], execution_count=None) if kind == "code" else {}
    return dict(cell_type=kind, id=uuid4().hex[:8], source=source, metadata=metadata, **extra)


def head(title, said, file, module):
    """Title, one line, and the ways to run the page."""
    links = [f"[Notebook](site:nbs/{file})", f"[Open in Colab]({COLAB}/blob/main/nbs/{file})"]
    links += [f"[`{module}`]({REPO}/blob/main/{module.replace('.', '/')}.py)"] if module else []
    return f"# {title}\n\n*{said}*\n\n{{.page-links}}\n{' · '.join(links)}"


def page(nb, file, files):
    """One processed notebook as a notebook for MyST-NB."""
    front = front_matter(nb)
    module = MODULES.get(files[file])
    cells = [cell("markdown", head(front["title"], front["description"], file, module))]
    shown = {}  # symbol -> what show_doc says of it, until its source comes along
    for c in nb["cells"][1:]:
        for out in c.get("outputs", []):
            text = "".join(out.get("data", {}).get("text/markdown", ""))
            if text and "show_doc(" in "".join(c["source"]):
                shown[re.search(r"show_doc\((.*)\)", "".join(c["source"]))[1]] = text
    for c in nb["cells"][1:]:
        source = "".join(c["source"])
        if c["cell_type"] == "markdown":
            if not source.startswith("<!-- WARNING"):
                cells.append(cell("markdown", markdown(source, files, file)))
            continue
        flags, source = directives(source)
        if (
            "show_doc(" in source
        ):  # of a cell that is not shown: here; of one that is: before its source
            name = re.search(r"show_doc\((.*)\)", source)[1]
            if public(name) and not any(
                "exports" in directives("".join(o["source"]))[0] and name in defined(o)
                for o in nb["cells"]
            ):
                text = symbol_heading([name], shown, shown) + "\n\n" + signature(shown[name])
                cells.append(cell("markdown", text))
            continue
        if "exports" in flags and (found := defined(c)):
            cells.append(cell("markdown", symbol_heading(found, shown, shown)))
        new = cell("code", source, tags=c["metadata"].get("tags", []))
        new["metadata"]["mystnb"] = {}
        if "hide-input" in new["metadata"]["tags"]:
            label = fold_label(source, flags)
            new["metadata"]["mystnb"] = dict(code_prompt_show=label, code_prompt_hide=label)
            if label == "A solution":
                new["metadata"]["tags"] = ["hide-cell"]
            before = cells[-1] if cells else new
            if label == before["metadata"].get("mystnb", {}).get("code_prompt_show") == "Setup":
                if not before["outputs"] and not c.get("outputs"):  # two in a row: one fold
                    before["source"] += "\n\n" + source
                    continue
        for out in c.get("outputs", []):
            if "text/markdown" in out.get("data", {}):
                out["data"]["text/markdown"] = markdown(
                    "".join(out["data"]["text/markdown"]), files, file
                )
        if flags.get("echo") == "false":
            new["metadata"]["tags"] += ["remove-input"]
        if "fig-alt" in flags:
            alt = flags["fig-alt"].strip('"')
            new["metadata"]["mystnb"]["image"] = dict(alt=alt)
            for out in c["outputs"]:  # a player's picture
                if "text/html" in out.get("data", {}):
                    text = "".join(out["data"]["text/html"])
                    out["data"]["text/html"] = re.sub(
                        '<img alt="[^"]*"', lambda m, alt=alt: f'<img alt="{escape(alt)}"', text
                    )
        cells.append(new | dict(outputs=c.get("outputs", [])))
    return dict(
        cells=cells,
        metadata=dict(kernelspec=nb["metadata"]["kernelspec"]),
        nbformat=4,
        nbformat_minor=5,
    )


def fold_label(source, flags):
    """What stands on a folded cell: whose code it is."""
    if "grade_" in source:
        return "The grader" if "def grade_" in source else "A solution"
    if "fig-alt" in flags or "Diagram(" in source:
        return "The code of this figure"
    lines = ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.M)).body
    plain = ast.Import | ast.ImportFrom | ast.Pass
    if any(map(is_book_style, lines)) or all(isinstance(o, plain) for o in lines):
        return "Setup"
    table = source.strip().splitlines()[-1].startswith("Markdown(")
    return "The code of this table" if table else "The code of this output"


def is_book_style(o):
    """Whether a statement is a call of `book_style`."""
    call = o.value if isinstance(o, ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "book_style"


def defined(c):
    """The public functions and classes of a code cell, patched methods as Class.method."""
    if c["cell_type"] != "code":
        return []
    try:
        body = ast.parse("".join(c["source"])).body
    except SyntaxError:
        return []
    found = [showdoc_nm(o) for o in body if isinstance(o, ast.FunctionDef | ast.ClassDef)]
    return [name for name in found if public(name)]


def api_page(order, files):
    """Every public name: signature with shapes, what it does, where it is derived, its source."""
    text = [
        "# All public names",
        "Each name leads to the page that derives it; signatures give shapes and units.",
    ]
    for file in order:
        if files[file] not in MODULES:
            continue
        module = importlib.import_module(MODULES[files[file]])
        text += [
            f"## {module.__name__}",
            module.__doc__.split("\n")[0],
            f"Page: [{file[:-6]}](site:{files[file]}.html)",
        ]
        own = [n for n in SYMBOLS if n.startswith(module.__name__ + ".") and n.count(".") == 3]
        for name in [*module.__all__, *(short(n) for n in own)]:
            owner, _, method = name.partition(".")
            thing = getattr(module, owner)
            thing = inspect.getattr_static(thing, method) if method else thing
            thing = thing.__func__ if isinstance(thing, classmethod | staticmethod) else thing
            thing = thing.fget if isinstance(thing, property) else thing
            if not callable(thing):
                said = repr(thing)
                if len(said) > 300 and isinstance(thing, dict):
                    said = f"a dict of {len(thing)}: {', '.join(map(str, thing))}"
                text += [f"### `{name}`", f"```text\n{said[:300]}\n```"]
                continue
            full = f"{module.__name__}.{name}"
            line = inspect.getsourcelines(thing)[1]
            shown = show_doc(thing, name=name)._repr_markdown_().replace("#LNone", f"#L{line}")
            body = symbol_heading([name], {name: shown})
            source = inspect.getsource(thing)
            text += [
                f"### {symbol_name(name)}",
                f"[derived here](site:{SYMBOLS[full]})" if full in SYMBOLS else "",
                re.sub('<a id="[^"]*"></a>', "", body.split("\n\n")[1]),
                signature(shown),
            ]
            text += [f"<details><summary>Source</summary>\n\n```python\n{source}```\n\n</details>"]
    return "\n\n".join(t for t in text if t)
