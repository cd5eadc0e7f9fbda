"""A dataclass of settings as a command line: each field is a flag."""

import argparse
import math
from dataclasses import field, fields


def at_least(least: int, kind: type) -> dict:
    """What argparse needs for a flag that takes a number from `least`."""
    def parse(text: str):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value
    parse.__name__ = "number"
    return {"type": parse}


COUNT, POSITIVE, REAL = at_least(0, int), at_least(1, int), at_least(0, float)


def flag(default, help: str, **more):
    """A field: its default, its help, and what else argparse needs."""
    return field(default=default, metadata={"help": help, **more})


def parse(settings: type, presets: dict[str, dict], description: str, arguments: list | None):
    """Read a command line into a `settings`. The help shows each flag's value in the presets."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--FLAG VALUE ...]      --help lists the flags")
    for f in fields(settings):
        more = dict(f.metadata)
        help = more.pop("help")
        values = [f"{name} {preset[f.name]}" for name, preset in presets.items()
                  if f.name in preset]
        if values or not (f.default is None or f.default is False):
            help += f" ({', '.join(values) or f.default})"
        if "bool" in str(f.type):
            more["action"] = argparse.BooleanOptionalAction
        else:
            more["metavar"] = None if "choices" in more else "N" if "type" in more else "X"
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, help=help, **more)
    return settings(**vars(parser.parse_args(arguments)))
