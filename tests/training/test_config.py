"""What is wrong with a configuration is said in one line, with the file, the line and the key."""

import json
import sys
from pathlib import Path

import pytest

from torchrec_cce.data.criteo import KAGGLE_UNIVERSES
from torchrec_cce.errors import ConfigError
from torchrec_cce.training import loop
from torchrec_cce.training.config import config_digest, parse_config
from torchrec_cce.training.config_file import read_config, read_run_config
from torchrec_cce.training.data_config import SplitConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GOOD = """\
seed = 3

[data]
format = "parquet"
dense = [
    "age",
    "price",
]

[data.train]
path = "train.parquet"
max_rows = 1000

[data.validation]
path = "validation.parquet"

[tables]
user = 1000
item = { num_embeddings = 2000, features = ["item", "seen"], pooling = "mean" }

[embedding]
dim = 16
method = "cce"
max_parameters = 800
num_columns = 4

[optimizer]
embedding = "adagrad"
embedding_learning_rate = 0.1

[recluster]
ct = 2
cf = 10

[training]
batch_size = 64
early_stopping = true
"""
LINES = GOOD.splitlines()
ITEM = next(line for line in LINES if line.startswith("item"))


def read(folder: Path, text: str) -> str:
    """The message of the error, less the folder."""
    (folder / "run.toml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_config(folder / "run.toml")
    message = str(raised.value)
    assert message.startswith(f"{folder}/run.toml:")
    assert "\n" not in message
    return message.removeprefix(f"{folder}/")


def with_line(old: str, new: str) -> tuple[str, int]:
    """GOOD with one line replaced, and its number."""
    number = LINES.index(old) + 1
    return "\n".join([*LINES[: number - 1], new, *LINES[number:]]) + "\n", number


def test_the_good_one(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(GOOD)
    config = read_config(tmp_path / "run.toml")
    assert config.tables["user"].num_embeddings == 1000
    assert config.tables["item"].features == ("item", "seen")
    assert config.universes() == {"user": 1000, "item": 2000, "seen": 2000}
    assert config.data.dense == ("age", "price")


def test_round_trip_through_json(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(GOOD)
    config = read_config(tmp_path / "run.toml")
    again = parse_config(json.loads(json.dumps(config.as_dict())))
    assert again == config
    assert again.as_dict() == config.as_dict()


def test_pointers_of_4_bits_are_in_the_digest_only_where_they_are_asked_for(tmp_path: Path) -> None:
    """So that those of older runs stay what they were."""
    (tmp_path / "run.toml").write_text(GOOD)
    usual = read_config(tmp_path / "run.toml")
    assert "min_pointer_bits" not in usual.as_dict()["embedding"]
    text, _ = with_line("num_columns = 4", "num_columns = 4\nmin_pointer_bits = 4")
    (tmp_path / "run.toml").write_text(text)
    small = read_config(tmp_path / "run.toml")
    assert parse_config(small.as_dict()) == small
    assert config_digest(small) != config_digest(usual)


@pytest.mark.parametrize(
    ("old", "new", "key", "what"),
    [
        # Unknown keys
        ("seed = 3", "sed = 3", "sed", "unknown key; allowed: data, tables, embedding, model, "),
        ("max_rows = 1000", "rows = 1000", "data.train.rows", "unknown key; allowed: path, skip_rows, max_rows"),
        ("dim = 16", "dimension = 16", "embedding.dimension", "unknown key; allowed: dim, method, "),
        ("[recluster]", "[reclustering]", "reclustering", "unknown key; allowed: "),
        (
            ITEM,
            'item = { num_embeddings = 2000, pool = "mean" }',
            "tables.item.pool",
            "unknown key; allowed: num_embeddings, features, pooling",
        ),
        # Wrong types
        ("max_rows = 1000", "max_rows = 10.5", "data.train.max_rows", "Input should be a valid integer"),
        (
            "max_rows = 1000",
            'max_rows = "1000"',
            "data.train.max_rows",
            "Input should be a valid integer; found '1000'",
        ),
        ("batch_size = 64", "batch_size = true", "training.batch_size", "Input should be a valid integer; found True"),
        ("batch_size = 64", "batch_size = 2024-01-31", "training.batch_size", "Input should be a valid integer"),
        ("early_stopping = true", "early_stopping = 1", "training.early_stopping", "Input should be a valid boolean"),
        ("user = 1000", 'user = "many"', "tables.user.num_embeddings", "Input should be a valid integer; found 'many'"),
        ("dense = [", "dense = [3,", "data.dense.0", "Input should be a valid string; found 3"),
        ('path = "train.parquet"', "path = 7", "data.train.path", "7 is neither a file, folder or pattern nor a list"),
        ('path = "train.parquet"', 'path = ["a", 7]', "data.train.path", "['a', 7] is neither a file, folder or"),
        ('path = "train.parquet"', "path = []", "data.train.path", "[] is neither a file, folder or pattern nor a"),
        ("max_rows = 1000", 'part = "half"', "data.train.part", "Input should be a valid array; found 'half'"),
        ("max_rows = 1000", "part = [0, 2, 4]", "data.train.part", "Tuple should have at most 2 items after"),
        # Values
        (
            'method = "cce"',
            'method = "cec"',
            "embedding.method",
            "Input should be 'full', 'hashing_trick', ",
        ),
        ('embedding = "adagrad"', 'embedding = "adam2"', "optimizer.embedding", "Input should be 'sgd', "),
        (
            'format = "parquet"',
            'format = "csv"',
            "data.format",
            "Input should be 'criteo', 'parquet' or 'remapped'; found 'csv'",
        ),
        ("batch_size = 64", "batch_size = 0", "training.batch_size", "Input should be greater than 0; found 0"),
        ("max_rows = 1000", "skip_rows = -1", "data.train.skip_rows", "Input should be greater than or equal to 0"),
        ("max_rows = 1000", "sample_every = 0", "data.train.sample_every", "Input should be greater than 0; found 0"),
        ("max_rows = 1000", "part = [-1, 2]", "data.train.part.0", "Input should be greater than or equal to 0"),
        ("max_rows = 1000", "part = [2, 2]", "data.train.part", "part=[2, 2] must be [i, n] with i in 0..1; the first"),
        ("user = 1000", "user = 0", "tables.user.num_embeddings", "Input should be greater than 0; found 0"),
        (
            "embedding_learning_rate = 0.1",
            "embedding_learning_rate = nan",
            "optimizer.embedding_learning_rate",
            "Input should be a finite number",
        ),
        ("cf = 10", 'backend = "torch"', "recluster.backend", "Input should be 'numba', 'faiss' or 'sklearn'; found"),
        ("cf = 10", "cf = 0", "recluster.cf", "cf=0 must be at least 1 where ct is 2"),
        ("cf = 10", "points_per_centroid = 0\ncf = 1", "recluster.points_per_centroid", "points_per_centroid=0"),
        ("num_columns = 4", "min_pointer_bits = 6", "embedding.min_pointer_bits", "Input should be 4 or 8; found 6"),
        # What does not fit together
        ("max_parameters = 800", "max_parameters = 31", "embedding.max_parameters", "table 'user': max_parameters=31"),
        ("num_columns = 4", "num_columns = 3", "embedding.num_columns", "table 'user': num_columns=3 does not divide"),
        ("user = 1000", "seen = 1000", "tables", "tables=['seen', 'item'] both read 'seen'"),
        ("user = 1000", "type = 1000", "tables.type", "'type' cannot name a table"),
        ("user = 1000", '"a.b" = 1000', "tables.a.b", "'a.b' cannot name a table"),
    ],
)
def test_a_bad_line(tmp_path: Path, old: str, new: str, key: str, what: str) -> None:
    text, number = with_line(old, new)
    if key == "tables":
        number = LINES.index("[tables]") + 1
    assert read(tmp_path, text).startswith(f"run.toml:{number}: {key}: {what}")


@pytest.mark.parametrize(
    ("old", "where", "key", "what"),
    [
        ("max_parameters = 800", 'method = "cce"', "embedding.method", "method='cce' needs max_parameters"),
        ('path = "train.parquet"', "[data.train]", "data.train.path", "is required"),
        ("cf = 10", "[recluster]", "recluster.cf", "cf=0 must be at least 1"),
    ],
)
def test_a_missing_line_is_reported_where_it_should_be(
    tmp_path: Path, old: str, where: str, key: str, what: str
) -> None:
    lines = [line for line in LINES if line != old]
    message = read(tmp_path, "\n".join(lines))
    assert message.startswith(f"run.toml:{lines.index(where) + 1}: {key}: {what}")


def test_missing_sections(tmp_path: Path) -> None:
    assert read(tmp_path, "") == "run.toml:1: data: is required"
    assert read(tmp_path, '[tables]\nuser = 5\n[data]\nformat = "criteo"\n') == "run.toml:3: data.train: is required"
    without = GOOD[: GOOD.index("[tables]")] + GOOD[GOOD.index("[embedding]") :]
    assert read(tmp_path, without) == "run.toml:1: tables: is required"


def test_early_stopping_needs_validation(tmp_path: Path) -> None:
    text = GOOD.replace('[data.validation]\npath = "validation.parquet"\n', "")
    number = text.splitlines().index("early_stopping = true") + 1
    assert read(tmp_path, text) == (
        f"run.toml:{number}: training.early_stopping: early_stopping=true needs data.validation"
    )


def test_no_tables(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("[tables]")] + GOOD[GOOD.index("[embedding]") :]
    message = read(tmp_path, "tables = {}\n" + text)
    assert message.startswith("run.toml:1: tables: Dictionary should have at least 1 item")
    number = len(text.splitlines()) + 1
    assert read(tmp_path, text + "[tables]\n").startswith(f"run.toml:{number}: tables: Dictionary should have at least")


def test_tables_of_a_data_set_in_one_line(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("[tables]")] + GOOD[GOOD.index("[embedding]") :]
    (tmp_path / "run.toml").write_text('tables = "criteo_kaggle"\n' + text)
    config = read_config(tmp_path / "run.toml")
    assert config.universes() == KAGGLE_UNIVERSES
    assert parse_config(json.loads(json.dumps(config.as_dict()))) == config
    message = read(tmp_path, 'tables = "criteo"\n' + text)
    assert message == "run.toml:1: tables: 'criteo' is no preset; allowed: 'criteo_kaggle', or a section [tables]"


def test_the_backend_of_k_means_is_a_setting_of_clusterings(tmp_path: Path) -> None:
    for line, backend in (("", "numba"), ('backend = "sklearn"', "sklearn")):
        (tmp_path / "run.toml").write_text(GOOD.replace("cf = 10", f"cf = 10\n{line}"))
        assert read_config(tmp_path / "run.toml").recluster.settings().backend == backend


def test_the_rows_of_a_split() -> None:
    """As the readers number them, from `skip_rows` on."""
    for options, expected in [
        ({}, range(100)),
        ({"sample_every": 8}, range(0, 100, 8)),
        ({"part": (1, 2)}, range(1, 100, 2)),
        ({"sample_every": 8, "part": (0, 2)}, range(0, 100, 16)),
        ({"sample_every": 8, "part": (1, 2)}, range(8, 100, 16)),
    ]:
        split = SplitConfig(path="log.tsv", **options)  # type: ignore[arg-type]
        assert range(100)[split.first :: split.every] == expected


def test_what_messages_call_a_split() -> None:
    assert str(SplitConfig(path="log.tsv")) == "log.tsv"
    assert str(SplitConfig(path=("day_0", "day_1"))) == "day_0, day_1"


@pytest.mark.parametrize(
    ("old", "new", "at", "key", "what"),
    [
        (
            'format = "parquet"',
            'format = "parquet"\nlabel = "price"',
            "dense = [",
            "data.dense",
            "'price' is the label",
        ),
        (
            "[data.train]",
            '[data.columns]\nitem = "sku"\nitems = "sku"\n[data.train]',
            'items = "sku"',
            "data.columns.items",
            "no table reads a feature 'items'; they read ['user', 'item', 'seen']",
        ),
        (
            "[data.train]",
            '[data.columns]\nitem = "label"\n[data.train]',
            'item = "label"',
            "data.columns.item",
            "'label' is the label",
        ),
        (
            ITEM,
            'item = 2000\n[model]\nname = "gmf"',
            "dense = [",
            "data.dense",
            "model.name='gmf' reads no dense fields; leave them out",
        ),
        ('format = "parquet"', 'format = "criteo"', "dense = [", "data.dense", "format='criteo' has fields of its own"),
    ],
)
def test_what_would_be_read_to_no_effect(tmp_path: Path, old: str, new: str, at: str, key: str, what: str) -> None:
    """A new run is refused; an older one that says it still opens."""
    text, _ = with_line(old, new)
    message = read(tmp_path, text)
    assert message.startswith(f"run.toml:{text.splitlines().index(at) + 1}: {key}: {what}")
    config = parse_config(tomllib.loads(text))
    (tmp_path / "config.json").write_text(json.dumps(config.as_dict()))
    assert read_run_config(tmp_path) == config
    with pytest.raises(ConfigError, match=f"^{key}: "):
        loop.train(config, tmp_path / "run", show_progress=False)


def test_gmf_needs_two_features(tmp_path: Path) -> None:
    number = len(LINES) + 2
    message = read(tmp_path, GOOD + '[model]\nname = "gmf"\n')
    assert message.startswith(f"run.toml:{number}: model.name: name='gmf' needs two features")


@pytest.mark.parametrize(
    ("line", "number"), [("seed =", 1), ("[data", 3), ("user = 1000 1000", 17), ('path = "half', 11), ("dim = 16", 26)]
)
def test_not_toml(tmp_path: Path, line: str, number: int) -> None:
    lines = [*LINES[: number - 1], line, *LINES[number:]]
    assert read(tmp_path, "\n".join(lines) + "\n").startswith(f"run.toml:{number}: not TOML: ")


def test_inline_tables_and_dotted_keys(tmp_path: Path) -> None:
    text = 'tables = { user = 5 }\ndata = { format = "criteo", train = { path = "x", rows = 3 } }\n'
    assert read(tmp_path, text).startswith("run.toml:2: data.train.rows: unknown key")
    text = 'tables.user = 5\ndata.format = "criteo"\ndata.train.path = "x"\ndata.train.skip_rows = -2\n'
    assert read(tmp_path, text).startswith("run.toml:4: data.train.skip_rows: Input should be greater")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: .*No such file"):
        read_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"cannot be read: .*directory"):
        read_config(tmp_path)
    (tmp_path / "run.toml").write_bytes(b"seed = \xff")
    with pytest.raises(ConfigError, match=r"cannot be read: .*utf-8"):
        read_config(tmp_path / "run.toml")


def test_the_configuration_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"no config.json, so there is no run"):
        read_run_config(tmp_path)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"config.json: not JSON"):
        read_run_config(tmp_path)
    path.write_text('{"tables": {"a": 5}, "data": {"format": "criteo"}}')
    with pytest.raises(ConfigError, match=r"config.json: data.train: is required$"):
        read_run_config(tmp_path)
