"""Text for the bundled tiny checkpoints: fetch, clean, split and write.

The text is the LibreOffice help in English and Chinese (MPL-2.0), as packaged by Debian.  A help page exists once
per language under the same relative path, so the *path* decides the split: a page and its translation always land
on the same side, and a model can never have seen the translation of a held-out page.  Help pages also repeat one
another's paragraphs, so each paragraph is kept once over the whole corpus (held-out first, then calibration), which
makes the three splits disjoint by paragraph as well as by document.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = ("libreoffice-help-en-us", "libreoffice-help-zh-cn")
LANGUAGES = ("en-US", "zh-CN")
SPLITS = ("heldout", "calibration", "train")  # also the order in which a repeated paragraph finds its home
BLOCK_TAGS = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "td", "th", "tr", "div", "br", "table", "ul"})
SKIP_TAGS = frozenset({"script", "style", "pre", "code", "head", "header", "footer", "aside", "nav", "button"})
MIN_CHARS = {"en-US": 30, "zh-CN": 12}
HAN = re.compile(r"[\u4e00-\u9fff]")
LETTER = re.compile(r"[A-Za-z]")


@dataclass(frozen=True)
class Document:
    """One help page in one language: its path (the split key) and its paragraphs."""

    path: str
    language: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.paragraphs)


class HelpPage(HTMLParser):
    """Collects the paragraphs inside the page's display area and nothing of the navigation round it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._buffer: list[str] = []
        self._inside = False
        self._skip = 0
        self._spans: list[bool] = []  # open spans, True where the text is the macOS twin of the text that follows

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div":
            identity = dict(attrs).get("id")
            if identity == "DisplayArea":
                self._inside = True
            elif identity in ("SearchFrame", "DonationFrame", "DEBUG"):
                self._inside = False
        elif tag == "span":
            self._spans.append(dict(attrs).get("class") == "MAC")
        if tag in SKIP_TAGS:
            self._skip += 1
        if tag in BLOCK_TAGS:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in SKIP_TAGS and self._skip:
            self._skip -= 1
        if tag == "span" and self._spans:
            self._spans.pop()
        if tag in BLOCK_TAGS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if self._inside and not self._skip and not any(self._spans):
            self._buffer.append(data)

    def flush(self) -> None:
        paragraph = " ".join("".join(self._buffer).split())
        self._buffer.clear()
        if paragraph:
            self.paragraphs.append(paragraph)


def fetch_packages(cache: Path) -> Path:
    """Download and unpack the Debian packages into `cache`; returns the folder that holds the unpacked trees."""
    cache.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        tree = cache / name
        if (tree / "usr").is_dir():
            continue
        subprocess.run(["apt-get", "download", name], cwd=cache, check=True)
        archive = sorted(cache.glob(f"{name}_*.deb"))[-1]
        subprocess.run(["dpkg", "-x", str(archive), str(tree)], check=True)
    return cache


def is_prose(paragraph: str, language: str) -> bool:
    """Whether a paragraph is a sentence of its language: drops table cells, code and untranslated paragraphs."""
    if len(paragraph) < MIN_CHARS[language]:
        return False
    han, latin = len(HAN.findall(paragraph)), len(LETTER.findall(paragraph))
    if language == "zh-CN":
        return han >= 8 and han >= 0.3 * len(paragraph)
    return han == 0 and latin >= 0.7 * len(paragraph.replace(" ", "")) and paragraph.count(" ") >= 4


def paragraph_key(paragraph: str) -> str:
    """Letters only, so that repeats that differ in digits, case, spacing or punctuation count as repeats."""
    return "".join(char for char in paragraph.casefold() if char.isalpha())


def split_of(path: str) -> str:
    """Deterministic split of a page by its path: 4% held-out, 8% calibration, the rest for training."""
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 1000
    return "heldout" if bucket < 40 else "calibration" if bucket < 120 else "train"


def read_pages(root: Path) -> list[tuple[str, str, list[str]]]:
    """(path, language, paragraphs) of each help page under `root`, in a fixed order."""
    pages = []
    for package, language in zip(PACKAGES, LANGUAGES, strict=True):
        base = root / package / "usr/share/libreoffice/help" / language / "text"
        files = sorted(base.rglob("*.html"))
        if not files:
            raise FileNotFoundError(f"no help pages under {base}: unpack {package} there or pass --text-cache")
        for file in files:
            page = HelpPage()
            page.feed(file.read_text(encoding="utf-8"))
            page.flush()
            pages.append((file.relative_to(base).as_posix(), language, page.paragraphs))
    return pages


def build_splits(root: Path) -> dict[str, list[Document]]:
    """The cleaned corpus, split by page and with each paragraph kept once over all splits."""
    pages = read_pages(root)
    seen: set[str] = set()
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for path, language, paragraphs in pages:
            if split_of(path) != split:
                continue
            kept = []
            for paragraph in paragraphs:
                key = paragraph_key(paragraph)
                if key not in seen and is_prose(paragraph, language):
                    seen.add(key)
                    kept.append(paragraph)
            if sum(map(len, kept)) >= 4 * MIN_CHARS[language]:
                splits[split].append(Document(path, language, tuple(kept)))
    for documents in splits.values():  # mix the languages: a prefix of the file is a sample of both
        documents.sort(key=lambda doc: hashlib.sha256(f"{doc.path} {doc.language}".encode()).digest())
    return splits


def render(documents: list[Document], max_bytes: int | None = None) -> str:
    """Documents as text: one paragraph a line, documents apart by one blank line, whole documents up to a size."""
    blocks, size = [], 0
    for document in documents:
        block = document.text
        size += len(block.encode()) + 2
        if max_bytes is not None and size > max_bytes:
            break
        blocks.append(block)
    return "\n\n".join(blocks) + "\n"
