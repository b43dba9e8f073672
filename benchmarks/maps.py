"""All figures of maps: remap, gather, vocabulary, registry."""

from benchmarks.gather import gather_figures
from benchmarks.registry import registry_figures
from benchmarks.remap import remap_figures
from benchmarks.vocabulary import vocabulary_figures

if __name__ == "__main__":
    remap_figures()
    gather_figures()
    vocabulary_figures()
    registry_figures()
