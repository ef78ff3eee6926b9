"""The command line: ``nsa-cp train | eval | bench | study | env``. Bad input ends in one sentence and exit code 2."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from nsa_cp.cli import bench, study
from nsa_cp.cli.arguments import place
from nsa_cp.training.errors import UserError

_ANOTHER_PATH = "choose another path, or give this user the right to it"
_ROOM = "make room, and go on with --resume"
# What the file system may refuse without a fault of the program.
_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EROFS), _ANOTHER_PATH),
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments; the process's own when None.

    Returns:
        The exit code: 0, 2 for bad input, or 1 if a command reports failure (failed runs, a failed check). Faults of the
        program itself raise.
    """
    # Before Megatron-Core is imported, which warns in each of its modules that optional packages are missing.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\..*")
    try:
        arguments = _parse(argv)
        return int(arguments.run(arguments) or 0)
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        message = f"{error.filename or 'a file'}: {error.strerror}; {_REMEDIES[error.errno]}"
    if _speaks():
        print(f"nsa-cp: {message}", file=sys.stderr, flush=True)
    return 2


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments like all other bad input: as a UserError, hence in one sentence and on one process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments. ``key=value`` settings may stand before and after options, which argparse alone does not allow."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    options = [item for item in rest if item.startswith("-")]
    if options or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(options or rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nsa-cp", allow_abbrev=False, description="Native Sparse Attention under context parallelism")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="train a model as a YAML file says",
        description="Train; under torchrun with several processes. All settings: nsa_cp/training/config.py, docs/training.md.",
    )
    train.add_argument("config", metavar="CONFIG", help="YAML file")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the file's, for example train.lr=3e-4"
    )
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    train.add_argument("--overwrite", action="store_true", help="begin again where a run of this name exists")
    train.set_defaults(run=_train)
    evaluate = commands.add_parser(
        "eval",
        allow_abbrev=False,
        help="validation loss of a run's checkpoint",
        description="Validate a checkpoint on the run's validation data.",
    )
    evaluate.add_argument("folder", type=place, metavar="RUN", help="folder of the run, for example runs/quickstart")
    evaluate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the run's, for example parallel.context=1"
    )
    evaluate.add_argument("--checkpoint", type=place, metavar="PATH", help="a checkpoint folder; default: the newest of the run")
    evaluate.set_defaults(run=_evaluate)
    bench.add_parser(commands)
    study.add_parser(commands)
    env = commands.add_parser("env", help="what a bug report needs to know about this machine")
    env.set_defaults(run=_env)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from nsa_cp.training.config_load import load_config

    config = load_config(arguments.config, arguments.overrides)
    _prepare_device(config.train.device)
    # Imported late: Megatron-Core takes seconds, which the report of an error in the YAML need not wait for.
    from nsa_cp.training.loop import train

    train(config, resume=arguments.resume, overwrite=arguments.overwrite)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from nsa_cp.training.config_load import load_config

    folder = arguments.folder
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} is not a run: it has no config.yaml; give a folder that nsa-cp train made, for example runs/quickstart"
        )
    config = load_config(folder / "config.yaml", arguments.overrides)
    # The run may have been moved since it was made: its folder is the one given here.
    config = config.model_copy(update={"runs_dir": str(folder.parent), "name": folder.name})
    _prepare_device(config.train.device)
    from nsa_cp.training.loop import evaluate

    result = evaluate(config, arguments.checkpoint)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result, indent=2))
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from nsa_cp.cli.env import report

    print(report())
    return 0


def _prepare_device(wanted: str) -> None:
    from nsa_cp.training.device import restrict_devices

    notice = restrict_devices(wanted)
    if notice and _speaks():
        print(f"nsa-cp: {notice}", file=sys.stderr, flush=True)


def _speaks() -> bool:
    """Whether this process reports errors. One per machine does: most errors occur everywhere, a missing file on one machine."""
    rank, size = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")), os.environ.get("WORLD_SIZE", "")
    # A rank that cannot be is reported by whoever has it.
    return not rank.isdecimal() or int(rank) == 0 or (size.isdecimal() and int(rank) >= int(size))


if __name__ == "__main__":
    sys.exit(main())
