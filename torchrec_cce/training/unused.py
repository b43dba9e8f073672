"""What a configuration says to no effect, or to a bad one. New runs are refused; older ones that have it still open."""

from torchrec_cce.errors import ConfigError
from torchrec_cce.training.config import RunConfig


def find_unused(config: RunConfig) -> tuple[list[str], str] | None:
    """The keys of the first entry that does nothing, or gives the label away, and what is wrong with it; or None."""
    data = config.data
    if data.format == "criteo":
        given = {"dense": data.dense, "columns": data.columns}
        for name, value in given.items():
            if value:
                return ["data", name], "format='criteo' has fields of its own, and does not read this; leave it out"
        return None
    if data.label in data.dense:
        return ["data", "dense"], f"{data.label!r} is the label, which the model would only copy; leave it out"
    features = config.universes()
    for feature, name in data.columns.items():
        if feature not in features:
            return ["data", "columns", feature], f"no table reads a feature {feature!r}; they read {list(features)}"
        if name == data.label:
            return ["data", "columns", feature], f"{name!r} is the label, which the model would only copy"
    if config.model.name == "gmf" and data.dense:
        return ["data", "dense"], "model.name='gmf' reads no dense fields; leave them out, or choose 'dlrm'"
    return None


def check_used(config: RunConfig) -> None:
    """Raise ConfigError if there is something as `find_unused` finds."""
    found = find_unused(config)
    if found is not None:
        keys, message = found
        raise ConfigError(f"{'.'.join(keys)}: {message}")
