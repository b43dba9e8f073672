"""All figures of the offline jobs: remapped data, reclustering a checkpoint, a live model that adopts a map."""

from benchmarks.adopt import adopt_figures
from benchmarks.nearest import nearest_figures
from benchmarks.recluster_job import recluster_job_figures
from benchmarks.remap_job import remap_job_figures
from benchmarks.remap_small_chunks import small_chunks_figures
from benchmarks.remapped_logs import remapped_logs_figures
from benchmarks.remapped_reading import remapped_reading_figures

if __name__ == "__main__":
    nearest_figures()
    recluster_job_figures()
    remap_job_figures()
    small_chunks_figures()
    remapped_reading_figures()
    remapped_logs_figures()
    adopt_figures()
