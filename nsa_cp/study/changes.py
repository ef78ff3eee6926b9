"""Settings of a study changed by hand, to run variants of its arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, get_origin, get_type_hints

from nsa_cp.study.model import Decoder
from nsa_cp.study.table import Study
from nsa_cp.training.errors import UserError


def change_settings(study: Study, changes: Sequence[str]) -> Study:
    """The same study with other settings of model and training. What an arm sets itself stays as the arm has it.

    Args:
        changes: each ``nsa.FIELD=VALUE``, ``model.FIELD=VALUE`` or ``train.FIELD=VALUE``, with the fields of NSAConfig,
            :class:`ModelSettings` and :class:`TrainSettings`.

    Raises:
        UserError: an unknown field, a value of another type, or settings that do not fit each other.
    """
    if not changes:
        return study
    sections = {"nsa": study.model.nsa, "model": study.model, "train": study.train}
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for change in changes:
        place, _, text = change.partition("=")
        name, _, field = place.partition(".")
        if name not in sections or not field or not text:
            raise UserError(f"--set {change!r} is not understood; write nsa.FIELD=VALUE, model.FIELD=VALUE or train.FIELD=VALUE")
        values[name][field] = _parsed(sections[name], change, field, text)
    return _changed(study, values)


def _changed(study: Study, values: Mapping[str, Mapping[str, Any]]) -> Study:
    try:
        model = replace(study.model, nsa=replace(study.model.nsa, **values["nsa"]), **values["model"])
        if model.nsa.window_size < 1:
            raise ValueError(f"nsa.window_size = {model.nsa.window_size}, but several arms are about the window; use at least 1")
        # Some combinations are refused only by the model.
        Decoder(model, seed=0)
        return replace(study, model=model, train=replace(study.train, **values["train"]))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--set: {str(error).splitlines()[0]}") from error


def _parsed(section: Any, change: str, field: str, text: str) -> Any:
    """The value of a field of ``section`` that ``text`` stands for."""
    # Here, because the studies need it for nothing else.
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(type(section)).items()
    fields = {name: hint for name, hint in hints if not is_dataclass(hint) and get_origin(hint) is not tuple}
    if field not in fields:
        raise UserError(f"--set {change}: there is no setting {field!r} here, only {', '.join(fields)}")
    try:
        return TypeAdapter(fields[field]).validate_strings(text)
    except ValidationError as error:
        raise UserError(f"--set {change}: {error.errors()[0]['msg']}") from error
