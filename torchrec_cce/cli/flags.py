"""Flags of a command in place of the fields that the library's errors name.

The library knows no command line. Where an error says which argument to change, it names the parameter or the field in
backticks: "choose another `output`". A command says which flag sets that field, and its user reads of the flag.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torchrec_cce.errors import CCEError


@contextmanager
def naming_flags(**flags: str) -> Iterator[None]:
    """Put flags into the messages of the errors that pass.

    Args:
        flags: name of a field → what to say in its place: `output="--output-checkpoint"`. Other names stay as they are.
    """
    try:
        yield
    except CCEError as error:
        before = str(error)
        after = re.sub(r"`(\w+)`", lambda name: flags.get(name[1], name[0]), before)
        if after != before:
            error.args = (after,)
        raise
