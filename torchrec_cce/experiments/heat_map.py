"""Matrices as numbers, and the picture that is drawn from nothing else."""

from dataclasses import dataclass

from torchrec_cce.extras import require
from torchrec_cce.files.page import to_png


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One matrix."""

    title: str
    values: tuple[tuple[float, ...], ...]
    """Row by row."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Matrices side by side, in one scale of colours."""

    name: str
    """Of the picture's file, without its ending."""
    caption: str
    matrices: tuple[Matrix, ...]

    @property
    def text(self) -> str:
        """The caption."""
        return self.caption

    def to_png(self) -> bytes:
        """Draw it. Raises MissingExtraError."""
        figure = require("matplotlib.figure", "report").Figure(figsize=(9, 4.2), layout="constrained")
        widths = [len(matrix.values[0]) for matrix in self.matrices]
        tallest = max(len(matrix.values) for matrix in self.matrices)
        every = figure.subplots(1, len(self.matrices), width_ratios=widths, squeeze=False)[0]
        extreme = max(abs(value) for matrix in self.matrices for row in matrix.values for value in row)
        for axes, matrix in zip(every, self.matrices, strict=True):
            picture = axes.imshow(matrix.values, cmap="RdBu_r", vmin=-extreme, vmax=extreme)
            axes.set_title(matrix.title, fontsize=10)
            axes.set(xticks=[], yticks=[], ylim=(tallest - 0.5, -0.5))  # cells of one size in all of them
            axes.spines[:].set_visible(False)
        figure.colorbar(picture, ax=list(every), shrink=0.8)
        return to_png(figure)
