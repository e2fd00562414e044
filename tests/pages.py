"""What holds of every page: read by a parser, as a browser would."""

from __future__ import annotations

import base64
import io
import itertools
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

from PIL import Image

_VOID = {"meta", "img", "br", "link", "line", "rect"}
_ATTRIBUTES_THAT_LOAD = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"}


@dataclass
class Page:
    """The elements of a page: each its tag and attributes; text: what is read; open elements must be closed."""

    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    text: str = ""

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice"
        self.page.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.page.text += data


def checked(html: str) -> Page:
    """The page, after the rules of every page were checked: whole, alone, readable by everybody."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    page = parser.page
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(tags)
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], f"{tag} has a handler"
        for name in _ATTRIBUTES_THAT_LOAD & set(attributes):
            assert attributes[name].startswith(("data:image/", "#")), f"{tag} asks for {attributes[name][:50]}"
    assert "@import" not in html
    assert not re.search(r"url\(", html)
    (policy,) = (one for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")
    for image in page.of("img"):
        assert image["alt"]
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            assert picture.size == (int(image["width"]), int(image["height"]))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in page.elements:
        for name in ("aria-labelledby",):
            assert attributes.get(name, ids[0]) in ids
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
    assert page.of("html")[0]["lang"] == "en"
    assert len(page.of("main")) == len(page.of("h1")) == len(page.of("title")) == 1
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    return page
