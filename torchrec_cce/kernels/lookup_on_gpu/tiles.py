"""`Tiles`: how the lines of a layout are divided among the programs of a GPU."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchrec_cce.kernels.lookup.layout import SOURCE, TABLE, Group, Layout

_LANES = 128
"""Floats of an embedding that a program pools side by side: columns of one feature are then written together."""
_FLOATS = 2048
"""Of the outputs that a program has in registers."""
_MOST_BAGS = 128


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Runs of lines of one group, each of one feature."""

    group: Group
    lines: npt.NDArray[np.int64]
    """[tiles, 2]: the first line of each, and that after its last."""
    lanes: int
    """A power of 2, as long as the floats of the longest run."""

    @property
    def num_bags(self) -> int:
        """Of a program, a power of 2."""
        return min(_MOST_BAGS, _FLOATS // self.lanes)

    @classmethod
    def of(cls, layout: Layout) -> "list[Tiles]":
        """For each group of `layout`."""
        return [cls._of_group(layout, group) for group in layout.groups]

    @classmethod
    def _of_group(cls, layout: Layout, group: Group) -> "Tiles":
        most = max(1, _LANES // group.width)
        features = layout.columns[group.first : group.last][:, [TABLE, SOURCE]]
        runs: list[tuple[int, int]] = []
        for line in range(group.first, group.last):
            first, _ = runs[-1] if runs else (line, line)
            same = line > first and (features[line - group.first] == features[first - group.first]).all()
            if same and line - first < most:
                runs[-1] = first, line + 1
            else:
                runs.append((line, line + 1))
        longest = max(stop - first for first, stop in runs) * group.width
        return cls(group=group, lines=np.array(runs, np.int64), lanes=next_power_of_2(longest))


def next_power_of_2(number: int) -> int:
    """The smallest that is at least `number`, a positive one."""
    return 1 << (number - 1).bit_length()
