"""Loads a RunConfig from a YAML file and ``key=value`` arguments, and reports all its faults at once."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from nsa_cp.training import config_checks
from nsa_cp.training.config import RunConfig
from nsa_cp.training.errors import ConfigError, Problem, UserError
from nsa_cp.training.files import expanded


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from a YAML file.

    Args:
        path: the YAML file; ``name`` defaults to its stem.
        overrides: ``section.key=value`` arguments; the value is YAML.

    Returns:
        The resolved, checked run. What depends on the number of processes is checked later, by ``check_world``.

    Raises:
        UserError: the file cannot be read or is not YAML.
        ConfigError: settings that are unknown, have the wrong type or contradict each other; it lists all of them.
    """
    path = expanded(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"the configuration {path} is not UTF-8 text (byte {error.start}); give the path of a YAML file"
        ) from error
    tree = _parse_yaml(text, str(path))
    tree.setdefault("name", path.stem)
    return build_config(tree, overrides, source=str(path))


def build_config(tree: dict[str, Any], overrides: Sequence[str] = (), *, source: str = "configuration") -> RunConfig:
    """Check a nested mapping, as ``load_config`` does with a file's.

    Args:
        tree: sections and values; changed in place by the overrides.
        overrides: ``section.key=value`` arguments.
        source: what messages call the mapping.

    Raises:
        ConfigError: all faults, each with the setting's dotted path.
    """
    problems = apply_overrides(tree, overrides)
    config, found = _validate(tree)
    problems += found
    if problems or config is None:
        raise ConfigError(problems, source)
    return config.resolved()


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    """Set ``section.key=value`` arguments in ``tree``, in place; returns what is wrong with their form."""
    problems = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            problems.append(Problem("", f"override {override!r} is not of the form section.key=value"))
            continue
        try:
            value = _argument_value(text)
        except _YAML_FAULTS:
            problems.append(Problem(dotted, f"the value {text!r} is not valid YAML; quote it"))
            continue
        node: Any = tree
        for key in keys[:-1]:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
            if not isinstance(node, dict):
                problems.append(Problem(dotted, f"{key!r} is a value, not a section, so it has no key {keys[-1]!r}"))
                break
        else:
            node[keys[-1]] = value
    return problems


def _argument_value(text: str) -> Any:
    """The value of an argument: YAML where it is a list, a mapping, quoted, tagged or null, else the text as it stands, so that a
    prompt may hold ``#`` and ``: `` and end with a space."""
    begin = text.strip()[:1]
    if begin and (begin in "[{\"'!&*|>" or text.strip() in ("~", "null", "Null", "NULL")):
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader
    return text if begin else ""


def _validate(tree: dict[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = [_describe(item) for item in error.errors()]
        bad_sections = {item["loc"][0] for item in error.errors()}
        # The other sections are still checked for contradictions, so that no fault hides behind a typo elsewhere.
        sound = {key: value for key, value in tree.items() if key not in bad_sections and key in RunConfig.model_fields}
        partial = RunConfig.model_validate(sound).resolved()
        problems += config_checks.find_problems(partial, skip=frozenset(map(str, bad_sections)))
        return None, problems
    resolved = config.resolved()
    return config, config_checks.find_problems(resolved)


def _describe(item: Any) -> Problem:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return Problem(path, f"unknown key{_nearest(item['loc'])}")
    if item["input"] is None:
        return Problem(path, "has no value; give one or leave it out")
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
    if item["type"] in ("missing", "value_error"):
        return Problem(path, message)
    return Problem(path, f"{_short(item['input'])} {message}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(loc: Sequence[Any]) -> str:
    """``; did you mean ...?`` with the most similar name in the section, else with another section's field of this name."""
    section = _section_at(loc[:-1])
    key = str(loc[-1])
    if section is None:
        return ""
    near = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join([*map(str, loc[:-1]), near[0]])}?"
    elsewhere = [f"{name}.{key}" for name in RunConfig.model_fields if key in _fields_of(_section_at([name]))]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; the keys here are {', '.join(section.model_fields)}"


def _fields_of(section: type[BaseModel] | None) -> Sequence[str]:
    return list(section.model_fields) if section else []


def _section_at(loc: Sequence[Any]) -> type[BaseModel] | None:
    section: type[BaseModel] = RunConfig
    for part in loc:
        field = section.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
            annotation = typing.get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section


# Beside its own error: what PyYAML lets through of explicit tags (!!int abc, !!bool maybe, !!timestamp foo) and of deep nesting.
_YAML_FAULTS = (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with two changes: duplicate keys are errors, and scalars stay text (or null) for pydantic to parse.

    YAML itself would keep the last of two equal keys, read 010 as 8 and 1:30 as 90, and read a run called 123 or no as no text.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is no name (line {line})", None)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice (line {line})", None)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{source} is not valid YAML{where}: {error.problem}") from error
    except _YAML_FAULTS as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        raise UserError(f"{source} holds no settings; see configs/quickstart.yaml")
    if not isinstance(tree, dict):
        raise UserError(
            f"{source} holds a {type(tree).__name__}, not sections such as model: and train:; see configs/quickstart.yaml"
        )
    return {str(key): value for key, value in tree.items()}
