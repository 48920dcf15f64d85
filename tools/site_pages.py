"""A hook of mkdocs: the examples' pages become pages of the site, and links to source files become plain text.

The pages stay where a reader of the repository finds them; here they are only shown a second time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {  # page of the site -> file of the repository
    "devices/raspberry_pi.md": "examples/raspberry_pi/README.md",
    "devices/jetson.md": "examples/jetson/README.md",
    "devices/android.md": "examples/android/README.md",
    "devices/kotlin.md": "runtimes/kotlin/README.md",
    "devices/ios.md": "examples/ios/README.md",
    "devices/swift.md": "runtimes/swift/README.md",
    "devices/demo_adapter.md": "examples/demo_adapter/README.md",
    "devices/matrix.png": "examples/demo_adapter/matrix.png",
    "devices/vision_demo.md": "examples/vision_demo/README.md",
    "devices/vision_matrix.png": "examples/vision_demo/matrix.png",
    "devices/vision_scene.png": "examples/vision_demo/eval/000.png",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
FENCE = re.compile(r"^(```.*?^```|<!--.*?-->)[ \t]*$", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add the examples' pages and pictures; what mkdocs.yml does not list comes last, so that no page is lost."""
    for page, source in PAGES.items():
        path = ROOT / source
        content = path.read_bytes() if path.suffix == ".png" else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    known = set(re.findall(r"[\w/.-]+\.md", str(config["nav"])))
    more = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri not in known)
    if more:
        config["nav"].append({"More": more})
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at the site's own pages, and leave those to source files out."""
    here = page.file.src_uri
    source = ROOT / PAGES[here] if here in PAGES else ROOT / "docs" / here
    parts = FENCE.split(markdown)  # code blocks and comments at odd places: untouched
    return "".join(part if place % 2 else _relink(part, source, here) for place, part in enumerate(parts))


def _relink(text: str, source: Path, here: str) -> str:
    back = "../" * here.count("/")
    places = {ROOT / file: page for page, file in PAGES.items()}

    def replace(found: re.Match[str]) -> str:
        picture, words, target, anchor = found.groups()
        if not target or "://" in target or target.startswith("mailto:"):
            return found.group()
        file = (source.parent / target).resolve()
        if not file.exists():
            return found.group()  # broken: mkdocs says so
        if file.is_dir() and file / "README.md" in places:
            file = file / "README.md"
        if file in places:
            return f"{picture}[{words}]({back}{places[file]}{anchor or ''})"
        if file.is_relative_to(ROOT / "docs") and not (file.suffix == ".json" and file.name != "bundle.schema.json"):
            return f"{picture}[{words}]({back}{file.relative_to(ROOT / 'docs').as_posix()}{anchor or ''})"
        return words  # a file of the repository: named, not linked

    return LINK.sub(replace, text)
