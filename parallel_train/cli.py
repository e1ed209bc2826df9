"""What does the command line accept, and with which code does it exit?"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags

from parallel_train import commands, config_fields, flag_names
from parallel_train import config as config_lib
from parallel_train.errors import ENDINGS, FAULT, OK, USER_ERROR, Preempted, UserError
from parallel_train.paths import expanded
from parallel_train.say import drop_what_waits, print_flushed

INTERRUPTED = 130

_USAGE = """usage: python -m parallel_train COMMAND --config=FILE [--config.KEY=VALUE ...] [flags]

commands:
{commands}

flags:
{flags}

Every config field stands, with a comment, in configs/default.py.
"""


# What the errors of Python's and absl's parsers mean.
_NEEDED = {
    'invalid literal for int()': 'a whole number',
    'could not convert string to float': 'a number',
    'Non-boolean argument': 'True or False',
}


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (program name first) and returns the exit code."""
    code = _exit_code(argv)
    if code != OK or argv[1] == 'train':  # what others print is all that they give
        drop_what_waits()
    return code


def _exit_code(argv: Sequence[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors='backslashreplace'
            )  # whatever the terminal can show, and file names hold
    try:
        return _run(list(argv))
    except ENDINGS as error:
        if any(a.lstrip('-').lower() in ('debug', 'debug=true', 'debug=1') for a in argv):
            print_flushed(traceback.format_exc().rstrip(), sys.stderr)
        print_flushed(f'{"" if isinstance(error, Preempted) else "error: "}{error}', sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        goes_on = '; the same command goes on from the last checkpoint, if one was made'
        print_flushed(f'interrupted{goes_on if argv[1] == "train" else ""}', sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output went away, as `| head` does
        sys.stderr.close()
        return FAULT
    except Exception:
        print_flushed(traceback.format_exc().rstrip(), sys.stderr)
        return FAULT


def console() -> int:
    """The entry point `parallel-train`: like `python -m`, modules in this folder can be imported."""
    sys.path.insert(0, '')
    return main(sys.argv)


def _run(argv: list[str]) -> int:
    words = [arg for arg in argv[1:] if not arg.startswith('-')]
    wants_help = any(arg in ('--help', '-h', '--helpfull', 'help') for arg in argv[1:])
    if wants_help or not argv[1:]:
        print(_usage(), end='')
        return OK if wants_help else USER_ERROR
    name = argv[1]
    if name not in commands.COMMANDS:
        near = config_fields.nearest(name, list(commands.COMMANDS))
        raise UserError(
            f'command {name!r}: must be one of {", ".join(commands.COMMANDS)}, and come first{near}'
        )
    if len(words) > 1:
        raise UserError(f'argument {words[1]!r}: flags are written --flag=value')
    command = commands.COMMANDS[name]
    values, config = _parse(argv, command.flags)
    if config is None and command.needs_config:
        raise UserError('config: is missing; name a recipe, such as --config=configs/fashion_mnist.py')
    for flag in command.flags:
        if values[flag].value == '':  # as of a shell variable that is not set
            raise UserError(f"{flag}='': needs a value, --{flag}=VALUE")
    if values.devices is not None and values.devices < 1:
        raise UserError(f'devices={values.devices}: must be at least 1')
    _set_up_logging(show_ours=not getattr(values, 'json', False))
    return command.run(config, values) or OK


def _parse(argv: list[str], known: Sequence[str]) -> tuple[Any, Any]:
    """Returns the flags' values (as attributes) and the config with its overrides, or None.

    `--config=FILE` is loaded first, so that ml_collections parses `--config.KEY=VALUE` by the types of
    its fields; fields that the file leaves out can be overridden too.
    """
    values = flags.FlagValues()
    flag_names.define_flags(values, known)
    paths = [a.partition('=')[2] for a in argv if a.lstrip('-').startswith('config=')]
    rest = [a for a in argv if not a.lstrip('-').startswith('config=')]
    config = None
    if len(paths) > 1:
        raise UserError(f'config={paths[-1]!r}: is given {len(paths)} times; give one file')
    overridden = [a for a in rest if a.lstrip('-').startswith(('config.', 'noconfig.'))]
    if paths:
        path = expanded('config', paths[0]) if paths[0] else ''
        config = config_lib.complete(config_lib.load(path))
        _check_overrides(overridden, config)
        from ml_collections import config_flags

        config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=rest)
    elif overridden:
        raise UserError(f'{overridden[0]}: needs --config=FILE')
    try:
        values(rest)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(_flag_message(str(error), known)) from error
    return values, None if config is None else config_lib.complete(config)


def _check_overrides(overridden: list[str], config: Any) -> None:
    """Booleans may be given as absl takes them: `--config.KEY` is True, `--noconfig.KEY` is False."""
    for argument in overridden:
        name, equals, _ = argument.partition('=')
        key = name.partition('.')[2]
        if key not in config:
            raise UserError(f'config.{key}: there is no such field{config_fields.nearest(key, list(config))}')
        if not equals and not isinstance(config[key], bool):
            raise UserError(f'config.{key}: needs a value, --config.{key}=VALUE')


def _flag_message(message: str, known: Sequence[str]) -> str:
    """Says an absl flag error in our form: what, then the remedy."""
    first = message.strip().splitlines()[0]
    if 'Unknown command line flag' in first:
        name = first.split("'")[1]
        near = config_fields.nearest(name, list(known))
        return f'--{name}: there is no such flag here{near}; flags: {", ".join(known)}'
    flag, _, reason = first.removeprefix('flag ').partition(': ')
    for said, meant in _NEEDED.items():
        if said in reason:
            name, _, value = flag.removeprefix('--').partition('=')
            return f'{name}={value!r}: must be {meant}'
    return first


def _usage() -> str:
    texts = flag_names.FLAGS
    width = max(map(len, texts)) + 4
    return _USAGE.format(
        commands='\n'.join(f'  {n:<10}{c.summary}' for n, c in commands.COMMANDS.items()),
        flags='\n'.join(f'  --{n:<{width}}{flag.text}' for n, flag in texts.items()),
    )


def _set_up_logging(show_ours: bool) -> None:
    """Shows this package's own lines; keeps libraries' informational ones out of what the user reads."""
    import logging

    from absl import logging as absl_logging

    # Orbax logs each error as well as raising it, with a stack for each array.
    absl_logging.set_verbosity(absl_logging.FATAL)
    absl_logging.set_stderrthreshold(absl_logging.FATAL)
    # Likewise what it leaves unawaited after a read or a write that failed; and the clients of a store.
    for library in ('asyncio', 'gcsfs', 'google'):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    ours = logging.getLogger('parallel_train')
    ours.propagate = False
    if show_ours:
        ours.addHandler(logging.StreamHandler(sys.stdout))
        ours.setLevel(logging.INFO)
