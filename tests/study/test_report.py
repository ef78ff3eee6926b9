"""The page about finished runs: what it says of each claim, and what it leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nsa_cp.study import workers
from nsa_cp.study.report import write_report
from nsa_cp.study.store import RunStore
from nsa_cp.study.studies import build_study

STUDY = build_study("mqar", "tiny")


def record_of(arm: str, seed: int, accuracy: float) -> dict[str, Any]:
    run, figures = STUDY.run(arm, 4e-3, seed), {"loss": 1.0, "accuracy": accuracy}
    return {
        **workers.identity(run), "settings": run.as_dict(), "status": "done", "device": "cpu", "torch": "2", "finished": seed,
        "parameters": 8, "valid": figures, "test": figures, "attention": {}, "steps": 8, "train_seconds": 1.0, "seconds": 1.0,
        "graph": False, "curve": [{"step": 8, "gates": [[0.5, 0.5, 0.5]], **figures}],
    }  # fmt: skip


def page_of(accuracies: dict[str, list[float]], folder: Path) -> str:
    store = RunStore(folder / "mqar.jsonl")
    for arm, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            store.add(record_of(arm, seed, accuracy))
    return write_report("mqar", "tiny", store.path, folder)[0].read_text()


@pytest.fixture
def page(tmp_path: Path) -> str:
    return page_of(
        {
            "full": [0.99, 0.98, 0.99],
            "nsa": [0.985, 0.974, 0.986],
            "late_selection": [0.99, 0.92, 0.99],
            "late_slow_gates": [0.80, 0.79, 0.81],
            "late_shared_kv": [0.99],
        },
        tmp_path,
    )


@pytest.mark.parametrize(
    "arm, said",
    [
        ("nsa", "difference -0.50% [-0.75%, -0.25%] over 3 seeds; **shown**"),
        ("late_selection", "difference -2.00% [-10.61%, 6.61%] over 3 seeds; open: the interval holds both"),
        ("late_slow_gates", "difference -18.67% [-20.10%, -17.23%] over 3 seeds; **refuted**: it is worse by more"),
        ("late_shared_kv", "difference 0.00% (one seed); open"),
    ],
)
def test_a_claim_and_its_verdict(arm: str, said: str, page: str) -> None:
    lines = page.splitlines()
    at = lines.index(f"- `accuracy` of `{arm}` is no worse than full attention's by more than 1 points:")
    assert lines[at + 1 : at + 3] == [f"  - against `full`: {said}", "  - against `full_params`: not measured"]


def test_what_was_not_run_is_named_once_and_has_no_section_of_its_own(page: str, tmp_path: Path) -> None:
    assert "Claims about arms without runs" not in page and "## Defaults" in page
    # No pair of an arm and its control: nsa has none here.
    assert "## What each part is for" not in page
    (tmp_path / "few").mkdir()
    few = page_of({"full": [0.99], "late_selection": [0.98]}, tmp_path / "few")
    assert "Claims about arms without runs: `nsa`, `late_slow_gates`, `late_shared_kv`." in few.splitlines()
    assert few.count("- `accuracy` of") == 1 and "## Defaults" not in few
