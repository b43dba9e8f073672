"""All figures of attacks: damaged and hostile input, tries and violations."""

from benchmarks.damaged_checkpoints import damaged_checkpoint_figures
from benchmarks.damaged_parquet import damaged_parquet_figures
from benchmarks.hostile_registries import hostile_registries, skewed_clocks

if __name__ == "__main__":
    damaged_parquet_figures()
    damaged_checkpoint_figures()
    hostile_registries()
    skewed_clocks()
