"""Errors that name fields, as a user of the command line reads them."""

import pytest

from torchrec_cce.errors import CCEError, ConfigError, MissingExtraError, RegistryError
from torchrec_cce.training.command import naming_flags


@pytest.mark.parametrize("kind", [ConfigError, RegistryError])
def test_a_field_becomes_its_flag(kind: type[CCEError]) -> None:
    """Whatever else stands in backticks stays."""
    with pytest.raises(kind) as caught, naming_flags(output="--output-checkpoint", validation="--validate"):
        raise kind("output.parquet: choose another `output`, or leave `validation` out; `ls` and `seed` tell more")
    wanted = "output.parquet: choose another --output-checkpoint, or leave --validate out; `ls` and `seed` tell more"
    assert str(caught.value) == wanted


def test_an_error_without_fields_is_not_touched() -> None:
    error = MissingExtraError("install torchrec-cce[ray]")
    with pytest.raises(MissingExtraError) as caught, naming_flags(output="--output"):
        raise error
    assert caught.value is error
    assert str(error) == "install torchrec-cce[ray]"
