"""Definitions of the studies, by name and scale: ``full`` for one GPU, ``mini`` for a patient CPU, ``tiny`` for seconds on a CPU
to show that everything runs. What the studies ask is in docs/learning/README.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.study.arms import ARMS, DENSE_BLOCKS, from_full_arms, held_gates_arms, late_arms
from nsa_cp.study.corpus import Corpus, build_corpus, installed_packages
from nsa_cp.study.language import LanguageTask
from nsa_cp.study.model import ModelSettings
from nsa_cp.study.recall import RecallShape
from nsa_cp.study.recall_tasks import MqarTask, PasskeyTask, RecallStage
from nsa_cp.study.settings import TrainSettings
from nsa_cp.study.table import Claim, Study
from nsa_cp.study.task import Stage

STUDIES = ("mqar", "passkey", "language")
SCALES = ("full", "mini", "tiny")

# For recall: 4096 tokens are more than 8 times what a query sees of the tokens themselves (8 blocks of 32 and a window of 128).
_NSA = NSAConfig(compress_block_size=16, compress_stride=8, select_block_size=32, num_selected_blocks=8, window_size=128)
# For text: the paper's window and number of blocks, together an eighth of 8192 bytes, and the paper's 16 heads that choose
# together. A byte is about a quarter of a usual token, so compressed tokens stand for a quarter as many.
_TEXT_NSA = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=32, num_selected_blocks=16, window_size=512)
_SMALL_NSA = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=6, num_local_blocks=1, window_size=32
)
_TEXT_BYTES = {"full": 96 << 20, "mini": 16 << 20, "tiny": 1 << 20}
# Validation accuracies at which a stage of training ends early: a stage that leads up to the main ones, and a main stage.
_WELL_ENOUGH, _ALL_RIGHT = 0.95, 0.999
# Arms for which the claim is that recall is at most one percentage point worse than full attention's.
_CLAIMED = ("nsa", "late_selection", "late_slow_gates", "late_shared_kv")
# A quarter of the channels rotate; the others compare tokens alike at any distance.
_ROTARY = RotaryConfig(percent=0.25)


def _shape(length: int, pairs: int, queries: int, gap: int, stride: int, kinds: tuple[int, int, int]) -> RecallShape:
    fillers, keys, values = kinds
    return RecallShape(
        length=length, num_pairs=pairs, num_queries=queries, min_gap=gap, pair_stride=stride,
        num_fillers=fillers, num_keys=keys, num_values=values,
    )  # fmt: skip


def _schedule(tokens: int, kinds: tuple[int, int, int], *rows: tuple[int, ...], main: int) -> tuple[RecallStage, ...]:
    """Stages of training with ``tokens`` a step, from rows (length, pairs, queries, gap, stride, steps).

    Stages before number ``main`` only lead up to those of interest: they end once most answers are right.

    Args:
        kinds: number of fillers, keys and values in the vocabulary.
    """
    return tuple(
        RecallStage(
            shape=_shape(length, *shape, kinds), num_sequences=tokens // length, steps=steps,
            enough=_WELL_ENOUGH if number < main else _ALL_RIGHT,
        )
        for number, (length, *shape, steps) in enumerate(rows)
    )  # fmt: skip


def build_study(name: str, scale: str, text: Path | None = None, corpus: Corpus | None = None) -> Study:
    """A study of :data:`STUDIES` at a scale of :data:`SCALES`.

    Args:
        text: folder of packages for ``language``; None for the installed ones.
        corpus: a text built before, in place of ``text``.

    Raises:
        UserError: a folder with too little text.
    """
    if name == "language":
        return _language(scale, corpus or build_corpus(text or installed_packages(), _TEXT_BYTES[scale]))
    return {"mqar": _mqar, "passkey": _passkey}[name](scale)


def scale_steps(study: Study, factor: float) -> Study:
    """The same study with ``factor`` times the training steps in every stage, at least one."""

    def scaled(stage: Stage | RecallStage) -> Stage | RecallStage:
        return replace(stage, steps=max(1, round(stage.steps * factor)))

    return replace(study, task=replace(study.task, schedule=tuple(map(scaled, study.task.schedule))))


def _recall_model(scale: str, task: MqarTask | PasskeyTask, num_values: int) -> ModelSettings:
    common = {"vocab_size": task.vocab_size, "num_outputs": num_values, "shift": True, "rotary": _ROTARY}
    if scale == "full":
        return ModelSettings(hidden_size=128, kv_channels=64, ffn_hidden_size=352, nsa=_NSA, **common)
    hidden = 64 if scale == "mini" else 32
    return ModelSettings(hidden_size=hidden, kv_channels=hidden // 2, ffn_hidden_size=3 * hidden, nsa=_SMALL_NSA, **common)


def _recall_train(scale: str) -> TrainSettings:
    if scale == "full":
        return TrainSettings(warmup_steps=40, eval_every=25)
    return TrainSettings(warmup_steps=10, eval_every=25, precision="float32")


def _mqar(scale: str) -> Study:
    # One layer: with two, tokens pass on what they have read, and a question finds its answer though its pair is in no chosen
    # block. Pairs stand so close that a compressed token covers five: with half as many the compressed branch alone could read
    # them. At full scale, from the third stage on, they fill more blocks than a query chooses freely. The last stage repeats the
    # one before it, for arms whose selected branch is still closed in that.
    if scale == "full":
        kinds = (64, 256, 64)
        schedule = _schedule(
            32768, kinds, (64, 4, 32, 12, 3, 300), (256, 16, 96, 64, 3, 200), (1024, 96, 256, 288, 3, 200),
            (4096, 128, 1024, 512, 3, 900), (4096, 128, 1024, 512, 3, 900), main=4,
        )  # fmt: skip
    elif scale == "mini":
        kinds = (32, 64, 32)
        schedule = _schedule(
            6144, kinds, (64, 4, 32, 12, 3, 150), (256, 16, 96, 80, 3, 100), (768, 64, 256, 192, 3, 300),
            (768, 64, 256, 192, 3, 600), main=3,
        )  # fmt: skip
    else:
        kinds = (8, 16, 8)
        schedule = _schedule(512, kinds, (64, 4, 16, 8, 4, 4), (256, 8, 32, 80, 4, 4), main=1)
    task = MqarTask(schedule=schedule, test_batches=8 if scale == "full" else 2)
    claims = tuple(Claim(metric="accuracy", margin=0.01, arm=arm) for arm in _CLAIMED)
    return Study(
        name="mqar", scale=scale, title="Multi-query associative recall", task=task,
        model=replace(_recall_model(scale, task, kinds[-1]), num_layers=1), train=_recall_train(scale),
        arms=(*ARMS, *late_arms(len(schedule) - 1)), lrs=(1e-3, 2e-3, 4e-3), seeds=(0, 1, 2), select_by="accuracy",
        select_highest=True, claims=claims,
    )  # fmt: skip


def _passkey(scale: str) -> Study:
    if scale == "full":
        kinds, tested, main = (64, 256, 64), (8192, 32768, 65536), 3
        schedule = _schedule(
            65536, kinds, (64, 4, 32, 12, 2, 300), (512, 16, 192, 64, 2, 150), (2048, 16, 512, 300, 2, 100),
            (8192, 16, 512, 512, 2, 250), (32768, 16, 512, 512, 2, 40), (65536, 16, 512, 512, 2, 40), main=main,
        )  # fmt: skip
        depths, count, tokens, gap = tuple(x / 8 for x in range(9)), 16, 65536, 512
    elif scale == "mini":
        kinds, tested, main = (32, 64, 32), (512, 1024), 1
        schedule = _schedule(
            8192, kinds, (64, 4, 32, 12, 2, 150), (512, 8, 256, 80, 2, 150), (1024, 8, 256, 80, 2, 20), main=main
        )
        depths, count, tokens, gap = (0.0, 0.5, 1.0), 8, 4096, 80
    else:
        kinds, tested, main = (8, 16, 8), (128, 256), 0
        schedule = _schedule(512, kinds, (128, 4, 16, 66, 2, 4), (256, 4, 16, 80, 2, 2), main=main)
        depths, count, tokens, gap = (0.0, 1.0), 4, 512, 66
    tests_at = tuple((_shape(length, count, count, gap, 2, kinds), tokens // length) for length in tested)
    task = PasskeyTask(schedule=schedule, tests_at=tests_at, depths=depths, test_batches=2 if scale == "full" else 1)
    return Study(
        name="passkey", scale=scale, title="Passkey retrieval", task=task, model=_recall_model(scale, task, kinds[-1]),
        train=_recall_train(scale), arms=(*ARMS, *late_arms(max(1, main))), lrs=(2e-3, 4e-3, 8e-3), seeds=(0, 1, 2),
        select_by="accuracy", select_highest=True,
        claims=tuple(Claim(metric=f"accuracy_{length}", margin=0.01, arm=arm) for arm in _CLAIMED for length in tested),
    )  # fmt: skip


def _language(scale: str, corpus: Corpus) -> Study:
    # Half of the channels rotate: predicting text needs positions as well as similarity.
    rotary = RotaryConfig(percent=0.5)
    no_worse = Claim(metric="trailing_loss", margin=0.005, relative=True, higher_is_better=False)
    common = {"vocab_size": 256, "shift": True, "rotary": rotary}
    if scale == "full":
        # Most steps on long sequences, the first on short ones: see docs/learning/README.md for what NSA has without them.
        schedule = (Stage(1600, 16, 1024), Stage(1600, 4, 4096), Stage(4800, 2, 8192))
        task = LanguageTask(corpus=corpus, schedule=schedule, valid_batches=16, test_batches=64)
        model = ModelSettings(num_layers=4, hidden_size=256, num_attention_heads=16, ffn_hidden_size=704, nsa=_TEXT_NSA, **common)
        train = TrainSettings(warmup_steps=150, weight_decay=0.1, betas=(0.9, 0.95), eval_every=400)
    else:
        mini = scale == "mini"
        schedule = (Stage(100, 32, 256), Stage(200, 8, 1024)) if mini else (Stage(2, 4, 128), Stage(4, 2, 256))
        task = LanguageTask(corpus=corpus, schedule=schedule, valid_batches=2, test_batches=4 if mini else 2)
        hidden = 96 if mini else 32
        channels = hidden // 3 if mini else 16
        model = ModelSettings(hidden_size=hidden, kv_channels=channels, ffn_hidden_size=3 * hidden, nsa=_SMALL_NSA, **common)
        train = TrainSettings(warmup_steps=20, weight_decay=0.1, betas=(0.9, 0.95), eval_every=50, precision="float32")
    claimed = ("nsa", "shared_kv", "slow_gates", "late_selection", "late_slow_gates", "held_gates", "from_full")
    last = len(schedule) - 1
    arms = (*ARMS, *late_arms(1)[:2], *held_gates_arms(last), *from_full_arms(last), DENSE_BLOCKS)
    return Study(
        name="language", scale=scale, title="Language modelling on bytes of Python sources", task=task, model=model, train=train,
        arms=arms, lrs=(1e-3, 2e-3), seeds=(0, 1, 2), select_by="trailing_loss", select_highest=False,
        claims=tuple(replace(no_worse, arm=arm) for arm in claimed),
    )  # fmt: skip
