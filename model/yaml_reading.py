"""YAML that somebody wrote: plain values, each name once, and one error for whatever is wrong with it."""

from __future__ import annotations

from typing import Any, cast

import yaml

MOST_BRACKETS = 1000
"""Lists and objects that may begin on one line: PyYAML's time grows with the square of their number."""


class _Plain(yaml.SafeLoader):
    """Refuses a name that is given twice, of which YAML would take the last, and tells of what it can't make a value
    of as of everything else: its own constructors raise whatever Python's types do (`2001-99-99`, `!!int a`)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError):
            problem = f"{str(node.value)[:80]!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class _WithoutReferences(_Plain):
    """Follows no references, by which a few lines stand for more than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = cast(Any, self).peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "references are not followed", mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str, *, references: bool = True) -> Any:
    """The one document of `text`, None where it is empty.

    `references=False` is for files of strangers. Raises `yaml.YAMLError` whatever is wrong, nesting without end too.
    """
    if any(line.count("[") + line.count("{") > MOST_BRACKETS for line in text.splitlines()):
        raise yaml.YAMLError(f"more than {MOST_BRACKETS} lists and objects begin on one line")
    loader = (_Plain if references else _WithoutReferences)(text)
    try:
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()
