"""The site for programs that read: each page as Markdown (scheduler.html.md, where the modules' docstrings say it is) and
llms.txt, the list of them (llmstxt.org)."""

import binascii
import hashlib
import re

from pages import HOST, PROJECT


def plain_markdown(text):
    """A cell's Markdown without what only MyST reads: attributes, anchors, `site:` links, callouts."""
    text = re.sub(r"^\{\.symbol\}\n.*\n?", "", text, flags=re.M)
    text = re.sub(r"^\{[.#][^}\n]*\}\n", "", text, flags=re.M)
    text = re.sub(r"\[(`[^`\n]*`)\]\{\.owner\}", r"\1", text).replace(".``", ".")
    text = re.sub(r'<a id="[^"]*"></a>', "", text)
    text = re.sub(r"\]\(site:([\w.]+)\.html", r"](\1.html.md", text)
    text = re.sub(
        r"\]\((?:figures|design_docs)/(?=[^)]*\.(?:png|svg)\))", f"]({HOST}_images/", text
    )
    text = re.sub(r"\]\(site:(?=nbs/)", f"]({HOST}", text)
    text = re.sub(
        r"^:::\{(\w+)\}\n(.*?)\n:::$",
        lambda m: f"> **{m[1].title()}:** " + m[2].replace("\n", "\n> "),
        text,
        flags=re.M | re.S,
    )
    text = re.sub(r"^```\{toctree\}.*?^```\n*", "", text, flags=re.M | re.S)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def fenced(kind, text):
    """A block of code or of output, in a fence that its text does not close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`{3,}", text)), default=0))
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"


def picture_file(mime, data):
    """The file in which MyST-NB keeps a stored picture: named after its bytes."""
    data = "".join(data)
    if mime == "image/svg+xml":
        return hashlib.sha256("\n".join(data.splitlines()).encode()).hexdigest() + ".svg"
    ending = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif"}[mime]
    return f"{hashlib.sha256(binascii.a2b_base64(data)).hexdigest()}.{ending}"


def output_text(out, alt):
    """One stored output: text as text, a picture as a link to its file."""
    if out["output_type"] == "stream":
        return fenced("text", "".join(out["text"]))
    data = out.get("data", {})
    for mime in (
        "image/svg+xml",
        "image/png",
        "image/jpeg",
        "image/gif",
    ):  # as MyST-NB prefers them
        if mime in data:
            return f"![{alt}]({HOST}_images/{picture_file(mime, data[mime])})"
    if "text/markdown" in data:
        return plain_markdown("".join(data["text/markdown"]))
    if "text/html" in data:
        return f"*(An animation on the page: {alt})*"
    return fenced("text", "".join(data.get("text/plain", "")))


def plain_page(nb):
    """A page for the site (pages.page) as clean Markdown: prose, code, text outputs."""
    parts = []
    for c in nb["cells"]:
        if c["cell_type"] == "markdown":
            parts.append(plain_markdown(c["source"]))
            continue
        meta = c["metadata"]
        if c["source"] and "remove-input" not in meta.get("tags", []):
            parts.append(fenced("python", c["source"]))
        alt = meta.get("mystnb", {}).get("image", {}).get("alt", "")
        parts += [output_text(out, alt) for out in c["outputs"]]
    return "\n\n".join(p for p in parts if p) + "\n"


def llms(sections, titles, said, files):
    """llms.txt: what this is, and every page with one line."""
    text = f"# {PROJECT['name']}\n\n> {PROJECT['description']}\n\n"
    text += f"Every page is Markdown: prose, code and its outputs. The source: {PROJECT['urls']['Repository']}\n"
    for section in sections:
        text += f"\n## {section['section']}\n\n"
        text += "".join(
            f"- [{titles[f]}]({HOST}{files[f]}.html.md): {said[f]}\n" for f in section["contents"]
        )
    text += f"\n## Optional\n\n- [All public names]({HOST}api.html.md): signatures, docstrings and source\n"
    return text
