"""What is wrong with a plan is one line, with the line of its file."""

from pathlib import Path

import pytest

from tests.support.bench_plans import values
from torchrec_cce.errors import ConfigError
from torchrec_cce.experiments.plan import parse_plan, read_plan

PLAN = """seeds = [0, 1]
caps = [800, 1600]
learning_rates = [0.1, 0.2]

[run]
tables = {C1 = 1000}
[run.data]
format = "criteo"
train = {path = "log.tsv", max_rows = 100}
validation = {path = "log.tsv", skip_rows = 100, max_rows = 50}
test = {path = "log.tsv", skip_rows = 150}
[run.embedding]
dim = 8

[[methods]]
method = "full"
[[methods]]
name = "CCE, 2 columns"
method = "cce"
num_columns = 2
recluster = {ct = 2, cf = 10}
[[methods]]
method = "pq"
learning_rates = [0.1]
derive = {from = "full"}
[methods.training]
epochs = 0
"""


def test_a_plan_is_read(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    plan = read_plan(tmp_path / "plan.toml")
    assert [entry.name for entry in plan.methods] == ["full", "CCE, 2 columns", "pq"]
    assert [plan.caps_of(entry) for entry in plan.methods] == [[None], [800, 1600], [800, 1600]]
    assert [plan.rates_of(entry) for entry in plan.methods] == [(0.1, 0.2), (0.1, 0.2), (0.1,)]
    config = plan.configure(plan.methods[2], max_parameters=800, seed=1, learning_rate=0.1, source=Path("runs/full"))
    assert config.derive is not None
    assert config.derive.bits is None
    assert (config.derive.run, config.derive.dense, config.derive.circular) == ("runs/full", True, False)
    assert (config.training.epochs, config.seed, config.embedding.dim) == (0, 1, 8)


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("seeds = [0, 1]", "seeds = []", 1, "seeds: Tuple should have at least 1 item"),
        ("seeds", "seed", 1, "seed: unknown key; allowed: run, methods, seeds, caps, learning_rates"),
        ("caps = [800, 1600]", "", 17, "methods.1: 'CCE, 2 columns' needs caps, its own or those of the plan"),
        ("1600", "0", 2, "caps.1: Input should be greater than 0; found 0"),
        ("{C1 = 1000}", '"criteo"', 6, "run.tables: 'criteo' is no preset"),
        ("max_rows = 50", "rows = 50", 10, "run.data.validation.rows: unknown key; allowed: path, skip_rows"),
        ("test = ", "# test = ", 5, "run: a comparison needs data.validation and data.test"),
        ("dim = 8", 'dim = "8"', 13, "run.embedding.dim: Input should be a valid integer; found '8'"),
        ("dim = 8", 'dim = 8\n[run.derive]\nrun = "a"', 14, "run.derive: is for an entry of [[methods]], which names"),
        ("dim = 8", 'dim = 8\n[run.registry]\nurl = "a"', 15, "run.registry.url: the runs of a comparison publish"),
        ('"cce"', '"cca"', 19, "methods.1.method: Input should be 'full', 'hashing_trick'"),
        ("num_columns", "columns", 20, "methods.1.columns: unknown key; allowed: method, name, num_columns"),
        ("cf = 10", "cf = 0", 21, "methods.1.recluster.cf: cf=0 must be at least 1 where ct is 2"),
        ("cf = 10", "cg = 10", 21, "methods.1.recluster.cg: unknown key; allowed: ct, cf"),
        ('method = "pq"', 'method = "pq"\nuse_helper = false', 24, "methods.2.use_helper: use_helper=false is for"),
        ('from = "full"', 'from = "half"', 25, "methods.2.derive.from: 'half' is no entry; allowed: 'full', 'CCE"),
        ('from = "full"', 'from = "pq"', 25, "methods.2.derive.from: 'pq' from 'pq': a circle"),
        ('from = "full"', 'of = "full"', 25, "methods.2.derive.from: is required"),
        (
            'method = "full"',
            'method = "full"\nseeds = [0]',
            26,
            "methods.2.derive.from: 'full' has no runs from seeds [1] of",
        ),
        ('method = "full"', 'method = "full"\ncaps = [8]', 17, "methods.0.caps: caps=[8]: full tables have none"),
        ("CCE, 2 columns", "Full.", 18, "methods.1.name: 'full' and 'Full.' name the same folder; choose"),
        ("CCE, 2 columns", "---", 18, "methods.1.name: name='---' names a folder and needs a letter or a digit"),
        ("epochs = 0", "epochs = -1", 27, "methods.2.training.epochs: Input should be greater than or equal to 0"),
        ("epochs = 0", "epochs = 0]", 27, "not TOML: "),
    ],
)
def test_a_bad_line(tmp_path: Path, old: str, new: str, line: int, said: str) -> None:
    assert PLAN.count(old) == 1 or old in ("seeds",)
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        read_plan(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}:{line}: {said}")


def test_sections_that_the_file_leaves_to_the_caller(tmp_path: Path) -> None:
    given = values(tmp_path / "log.tsv")
    sections = {name: given["run"].pop(name) for name in ("data", "tables")}
    with pytest.raises(ConfigError, match=r"run\.data: is required"):
        parse_plan(given)
    assert list(parse_plan(given, sections=sections).run.tables) == ["C1", "C2", "C3"]
