"""A hook of mkdocs: what pages link to in bench/ and examples/ is published too, and no public name lacks its reference."""

import ast
import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

LOG = logging.getLogger("mkdocs.hooks.publish")
ROOT = Path(__file__).resolve().parents[2]
# On GitHub these links lead out of docs/; the site has the files under the same paths.
OUTSIDE = re.compile(r"\]\(\.\./((?:bench|examples)/[^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the files that pages link to, and ask for every name in `stepgraph.__all__`."""
    texts = {page.src_uri: page.content_string for page in files.documentation_pages()}
    for path in sorted({path for text in texts.values() for path in OUTSIDE.findall(text)}):
        if (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    reference = "\n".join(text for page, text in texts.items() if page.startswith("api/"))
    for name in public_names():
        if not re.search(rf"\bstepgraph\.(\w+\.)?{name}\b", reference):
            LOG.warning("docs/api says nothing of stepgraph.%s", name)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links out of docs/ lead to the published files."""
    return OUTSIDE.sub(r"](\1", markdown)


def public_names() -> list[str]:
    """`stepgraph.__all__`, without importing it."""
    for statement in ast.parse((ROOT / "core/__init__.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return list(ast.literal_eval(statement.value))
    return []
