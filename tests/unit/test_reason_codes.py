"""Every reason code that a refused row or picture can get stands in the runbook's table, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import get_args

from jobs import images
from pipeline.context import ROOT
from pipeline.encoders import image

GIVEN_BY = {"_verdict", "_no_text", "RejectReason"}  # what writes a code that is its first argument


def written() -> set[str]:
    """Codes by name in the code: what a verdict is given, a data set's rules (code, expression), and the codes of pictures."""
    files = [ROOT / "jobs" / "ingest.py", ROOT / "jobs" / "images.py", ROOT / "jobs" / "content_embedding.py", ROOT / "pipeline" / "encoders" / "image.py"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in [*files, *sorted((ROOT / "pipeline" / "datasets").glob("*.py"))]]
    found = {code for tree in trees for node in ast.walk(tree) for code in codes_of(node)}
    return found | set(get_args(image.Reason)) | set(get_args(images.ImageReason))


def codes_of(node: ast.AST) -> Iterator[str]:
    """The codes that one piece of code names."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str(code)), *_]) if name in GIVEN_BY:
            yield code
        case ast.keyword(arg="event_rules" | "item_rules", value=ast.Tuple(elts=rules)):
            yield from (code for rule in rules for code in rule_of(rule))
        case ast.Call(func=ast.Attribute(value=ast.Name(id="rules"), attr="append"), args=[rule]):
            yield from rule_of(rule)
        case ast.Call(func=ast.Attribute(attr="where"), args=[_, ast.Constant(value=""), ast.Constant(value=str(code))]):
            yield code  # vectors that an encoder made


def rule_of(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Tuple(elts=[ast.Constant(value=str(code)), _]):
            yield code


def explained() -> set[str]:
    """Codes of the first column of docs/operations.md's table."""
    lines = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| reason code | meaning |") + 2
    rows = lines[start : lines.index("", start)]
    return {code for row in rows for code in re.findall("`([a-z_]+)`", row.split("|")[1])}


def test_the_runbook_explains_every_reason_code() -> None:
    assert written() == explained()


def test_the_search_finds_codes_of_every_kind() -> None:
    kinds = {"malformed_row", "missing_user", "rating_out_of_range", "non_product_code", "bad_vector", "image_outside_root", "image_truncated", "image_changed"}
    assert kinds <= written()
    source = 'rules.append(("a_code", "x"))\nSpec(item_rules=(("b_code", f"{x}"),))\n_verdict("c_code", x, y)\n_verdict(reason, x, y)\n'
    assert {code for node in ast.walk(ast.parse(source)) for code in codes_of(node)} == {"a_code", "b_code", "c_code"}
