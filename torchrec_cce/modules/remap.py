"""From a KeyedJaggedTensor of raw IDs to one of physical rows: the parameter-free first step of a CCE collection."""

from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.renumbering import Renumbering
from torchrec_cce.maps.residency import Residency, Residents
from torchrec_cce.methods.cce import CCEConfig, CCEEmbeddingConfig
from torchrec_cce.methods.compositional import CompositionalConfig, SignedScheme
from torchrec_cce.methods.table import CompressedConfig
from torchrec_cce.modules.jagged import check_not_traced, int64_on_cpu, positions_of, variable_batch
from torchrec_cce.modules.map_stamp import MapStamp, WeightStamps, stamps_by_table
from torchrec_cce.modules.residents import carried_over
from torchrec_cce.modules.row_keys import WordKey, check_mark, in_segments, marked_keys, row_features_of, row_keys_of
from torchrec_cce.modules.row_weights import pools_by_mean, weights_of_rows
from torchrec_cce.modules.schemes import Schemes
from torchrec_cce.modules.word_form import WordForm


class Remap(Schemes):
    """Replaces each raw ID by its rows: a bag of `l` IDs becomes `c` bags of `t·l` rows, keyed by column;
    `t` is 1 for a CCE table without its helper.

    A table with residents gets another bag, of the slots of those of the IDs that have a private row; where it does not
    pool, one more of their places in the bag of IDs.

    Without parameters, so that a training pipeline may run it ahead of the model or a data loader in its collate; a
    KeyedJaggedTensor that is remapped already passes through. Runs on the CPU (Appendix D) and returns the result on
    the device that the features came from.

    Where a table is signed, every row has a weight: the sign of the codeword, times the ID's weight, if the input has
    any, or divided by the number of IDs in the bag, if its table pools by the mean.

    Args:
        tables: one configuration per table.
        is_weighted: whether per-sample weights are carried along.
    """

    def __init__(self, tables: Sequence[BaseEmbeddingConfig], *, is_weighted: bool) -> None:
        super().__init__(tables)
        self.is_weighted = is_weighted
        self._in_order = in_order = in_segments(tables)
        with_residents = [table for table in in_order if isinstance(table, CCEConfig) and table.residents is not None]
        self.makes_weights = (
            is_weighted
            or any(isinstance(found, SignedScheme) for found in self.schemes.values())
            # Not all IDs of a bag have a private row: no sum of rows can be divided by their number.
            or any(pools_by_mean(table) for table in with_residents)
        )
        self._residencies = {table.name: Residency.nobody(table.num_embeddings) for table in with_residents}
        self._leaves_out_residents = False
        self.num_changes = 0  # of what rows are of
        self._word_form: WordForm | None = None  # until it is asked for
        self._stamps = WeightStamps(self.cce_tables())
        self._stamp(self.cce_tables())
        self.table_features = [(table.name, feature) for table in in_order for feature in table.feature_names]
        self.row_features = row_features_of(in_order, with_weights=self.makes_weights)
        self.row_keys = row_keys_of(in_order)
        self._mark_rows()
        self.changes_keys = any(isinstance(table, CompressedConfig) for table in tables)

    def attach_pointer_map(self, table: str, pointer_map: PointerMap, residency: Residency | None = None) -> None:
        """From now on, the IDs of `table` have the pointers of `pointer_map`.

        Args:
            residency: who has a private row then. None: ages stay with their raw IDs, and a phase ends, unless the map
                is the one before with another vocabulary (`PointerMap.with_vocabulary`).
        """
        self.check_pointer_map(table, pointer_map)
        if residency is None and table in self._residencies:
            before = self.pointer_map(table)
            renumbering = Renumbering(old=before, new=pointer_map)
            residency = carried_over(self._residencies[table], renumbering)
            if renumbering.changes_nothing or pointer_map.generation != before.generation:
                residency = residency.closed()
        self._look_up_by(table, pointer_map)
        if residency is not None:
            self.attach_residency(table, residency)

    def _look_up_by(self, table: str, pointer_map: PointerMap) -> None:
        config = self._configs[table]
        assert isinstance(config, CCEConfig)
        self.schemes[table] = config.scheme_with(pointer_map)
        self._unseen[table] = 0
        self._stamp([table])
        self._mark_rows()

    def check_pointer_map(self, table: str, pointer_map: PointerMap) -> None:
        """Raise MapMismatchError unless `pointer_map` can be attached to `table`."""
        self.pointer_map(table)
        config = self._configs[table]
        assert isinstance(config, CompositionalConfig)
        pointer_map.check_sizes(
            table=table,
            num_ids=config.num_embeddings,
            num_columns=config.num_columns,
            num_rows=config.num_rows,
        )

    def residency(self, table: str) -> Residency:
        """Who has a private row. Raises ConfigError if `table` is none with residents."""
        if table not in self._residencies:
            those = ", ".join(self._residencies) or "none"
            raise ConfigError(f"{table!r} is not a table with residents; those are: {those}")
        return self._residencies[table]

    def attach_residency(self, table: str, residency: Residency) -> None:
        """From now on, the IDs of `table` that have a private row are those of `residency`.

        Raises:
            ConfigError: it is of another number of IDs, or of more residents than there are rows.
        """
        self.residency(table)
        config = self._configs[table]
        assert isinstance(config, CCEConfig)
        known = self.pointer_map(table).num_ids
        if residency.num_ids != known:
            raise ConfigError(
                f"table {table!r}: the ages of {residency.num_ids} IDs are not those of its map's {known}"
            )
        residents = residency.slots.num_taken if residency.is_open else 0
        if residents > config.max_residents:
            raise ConfigError(f"table {table!r}: {residents} residents are more than its {config.max_residents} rows")
        self._residencies[table] = residency
        self._mark_rows()

    def free_rows(self, table: str) -> int:
        """How many private rows nobody has in the open phase of `table`; 0 without one."""
        residency, config = self.residency(table), self._configs[table]
        assert isinstance(config, CCEConfig)
        return config.max_residents - residency.slots.num_taken if residency.is_open else 0

    def resident_tables(self) -> list[str]:
        """The names of the tables that have residents, now or at times."""
        return list(self._residencies)

    @property
    def leaves_out_residents(self) -> bool:
        """Whether all IDs get their codewords alone, as they will once the rows are folded."""
        return self._leaves_out_residents

    @leaves_out_residents.setter
    def leaves_out_residents(self, leaves_out: bool) -> None:
        self._leaves_out_residents = leaves_out
        self._mark_rows()

    @property
    def phase_is_open(self) -> bool:
        """Whether some table has residents now."""
        return any(residency.is_open for residency in self._residencies.values())

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Remap `features`: raw IDs, or words as `word_form` has them.

        Raises:
            InvalidIDError: an ID outside `0..num_embeddings - 1` of its table, or IDs that are not int32 or int64.
            ConfigError: a feature that a table needs is missing, or a key is there twice; in `torch.jit.trace`.
            MapMismatchError: `features` were remapped under other maps or residents; and as `check_weights`.
        """
        keys = features.keys()
        if self.changes_keys and keys == self.row_keys:
            check_mark(keys, self._marked_keys)
            if not torch.compiler.is_compiling():  # which would break a graph that is otherwise whole
                self.check_weights()
            return features
        check_not_traced()
        self.check_weights()
        form = self.word_form_of(keys)
        if form is not None:
            return self._rows_of_words(features, form)
        return self._rows(features, self.row_features, self._marked_keys)

    def part(self, features: KeyedJaggedTensor, tables: Set[str]) -> KeyedJaggedTensor:
        """The rows of raw `features` that `forward` returns of `tables`, and the slots of the residents of all tables.

        Args:
            tables: of a stock collection all or none.
        """
        row_features = [each for each in self.row_features if each[0] in tables]
        return self._rows(features, row_features, row_keys_of(self._in_order, tables))

    def _rows(
        self, features: KeyedJaggedTensor, row_features: Sequence[tuple[str, str]], row_keys: list[str]
    ) -> KeyedJaggedTensor:
        """What `forward` returns under `row_keys`: the rows of `row_features`, and the slots of all residents."""
        with_slots = [each for each in self.table_features if each[0] in self._residencies]
        position = positions_of(features.keys(), [feature for _, feature in (*row_features, *with_slots)])

        device = features.device()
        ids = int64_on_cpu(features)
        bounds = features.offset_per_key()
        spans = [slice(first, after) for first, after in pairwise(bounds)]  # of each feature of the input
        counts = [after - first for first, after in pairwise(bounds)]
        sources = [position[feature] for _, feature in row_features]
        schemes = [self.schemes[table] for table, _ in row_features]
        sizes = [
            counts[source] * scheme.num_columns * scheme.num_terms
            for source, scheme in zip(sources, schemes, strict=True)
        ]
        end = sum(sizes)
        # With room for slots and places, so that nothing is copied.
        rows = torch.empty(end + sum(2 * counts[position[feature]] for _, feature in with_slots), dtype=torch.int64)
        for (table, feature), source, scheme, out in zip(
            row_features, sources, schemes, rows[:end].split(sizes), strict=True
        ):
            shaped = out.view(scheme.num_columns, counts[source], scheme.num_terms).numpy()
            self.look_up(table, feature, ids[spans[source]], shaped)

        lengths = features.lengths().cpu().split(features.stride_per_key())
        columns = [source for source, scheme in zip(sources, schemes, strict=True) for _ in range(scheme.num_columns)]
        terms = [scheme.num_terms for scheme in schemes for _ in range(scheme.num_columns)]
        lengths_of_keys = [lengths[source] * t for source, t in zip(columns, terms, strict=True)]
        given: Sequence[torch.Tensor] = features.weights().cpu().split(counts) if self.is_weighted else ()

        def weights_of(table: str, source: int) -> torch.Tensor:
            """Of the IDs of a feature."""
            if given:
                return given[source]
            each = 1 / lengths[source] if pools_by_mean(self._configs[table]) else torch.ones_like(lengths[source])
            return each.float().repeat_interleave(lengths[source])

        weights = []
        if self.makes_weights:
            for (table, _), source, scheme in zip(row_features, sources, schemes, strict=True):
                weights.append(weights_of_rows(scheme, ids[spans[source]], weights_of(table, source)))
        residents = [
            (table, source, self._residents(table, ids[spans[source]], lengths[source]))
            for table, source in ((table, position[feature]) for table, feature in with_slots)
        ]
        parts = []
        for table, source, found in residents:
            parts.append(found.slots)
            lengths_of_keys.append(torch.from_numpy(found.lengths))
            columns.append(source)
            if self.makes_weights:
                weights.append(weights_of(table, source)[torch.from_numpy(found.places)])
        for table, source, found in residents:
            if isinstance(self._configs[table], CCEEmbeddingConfig):
                parts.append(found.places_in_bags(lengths[source].numpy()))
                lengths_of_keys.append(torch.from_numpy(found.lengths))
                columns.append(source)
        for part in parts:
            rows[end : end + len(part)] = torch.from_numpy(part)
            end += len(part)
        return KeyedJaggedTensor(
            keys=row_keys,
            values=rows[:end],
            lengths=torch.cat(lengths_of_keys),
            weights=torch.cat(weights) if self.makes_weights else None,
            **variable_batch(features, columns, row_keys),
        ).to(device)

    @property
    def word_form(self) -> WordForm | None:
        """How words of remapped data lie in the input that this takes in place of raw IDs or rows, under the present
        maps; None where rows need weights or IDs themselves: those of signed tables, of residents, of weighted bags."""
        if self._word_form is None and self.changes_keys and not self.makes_weights and not self._residencies:
            self._word_form = WordForm(self._in_order, self.schemes)
        return self._word_form

    def word_form_of(self, keys: Sequence[str]) -> WordForm | None:
        """That of an input with such keys; None if it has no words.

        Raises:
            MapMismatchError, ConfigError: the words are of other maps, or of another collection.
        """
        if not keys or not isinstance(keys[0], WordKey):
            return None
        form = self.word_form
        if form is None:
            raise ConfigError("this collection takes no words: it has residents or weights; give it rows or raw IDs")
        form.check(keys)
        return form

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _rows_of_words(self, features: KeyedJaggedTensor, form: WordForm) -> KeyedJaggedTensor:
        batch, lengths = features.stride(), features.lengths().cpu()
        offsets = features.offsets().cpu().long()
        words = form.words(features.values().cpu(), offsets, batch).numpy().view(np.uint64)
        bounds = offsets[:: max(1, batch)].tolist()
        rows, of_bags = [], []
        for table, feature in self.row_features:
            source = form.features.index(feature)
            found = form.rows(words[:, bounds[source] : bounds[source + 1]], table, feature)
            rows.append(found.reshape(-1))
            own = lengths[source * batch : (source + 1) * batch] * found.shape[2]
            of_bags += [own] * len(found)
        return KeyedJaggedTensor(
            keys=self._marked_keys,
            values=torch.from_numpy(np.concatenate(rows)),
            lengths=torch.cat(of_bags),
            stride=batch,
        ).to(features.device())

    def _mark_rows(self) -> None:
        """From now on, rows are of the maps and residents there are now."""
        self.num_changes += 1
        self._word_form = None
        digests = [self.pointer_map(table).digest for table in self.cce_tables()]
        self._marked_keys = marked_keys(self.row_keys, derive_seed(*digests, *self._phases()))

    def _residents(self, table: str, ids: npt.NDArray[np.int64], of_bags: torch.Tensor) -> Residents:
        """The members of bags that have a private row; `ids: [N]`, which were looked up, of bags of lengths `[B]`."""
        residency, lengths = self._residencies[table], of_bags.numpy()
        if self.leaves_out_residents or not residency.is_open:
            nobody = np.empty(0, np.int64)
            return Residents(nobody, nobody, np.zeros_like(lengths))
        pointer_map = self.pointer_map(table)
        positions = pointer_map.resolve(ids).positions if pointer_map.takes_any_id else ids
        return residency.slots.of_bags(positions, lengths)

    def get_extra_state(self) -> torch.Tensor:
        """The stamps of the maps, `[maps, 34] int64`, always the same tensor: see `WeightStamps`.

        No dict: the distributed checkpoint's planner cannot place one on ranks that hold no optimizer state.
        """
        return self._stamps.tensor

    def _stamp(self, tables: Iterable[str]) -> None:
        """The weights of `tables` are taken to be those of the attached maps."""
        for table in tables:
            self._stamps.write(table, MapStamp.of(table, self.pointer_map(table)))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check_weights(self) -> None:
        """Raise MapMismatchError if weights of another map were loaded in place of those there were.

        That is so after `torch.distributed.checkpoint.load(model.state_dict())`, which compares nothing.
        """
        if self._stamps.were_overwritten:
            self._take_over(self._stamps.loaded(), "the weights, which were loaded in place, were")

    def stamp(self) -> torch.Tensor:
        """What rows are of, [N] int64: while it stays the same, a raw ID has the same rows.

        The stamps of the maps; and for each table with residents the phase in which IDs have private rows, and how
        many have, 0 for none.
        """
        phases = torch.tensor(self._phases(), dtype=torch.int64)
        return torch.cat([self.get_extra_state().flatten(), phases])

    def _phases(self) -> list[int]:
        return [
            number
            for residency in self._residencies.values()
            for number in (
                (residency.phases, residency.slots.num_slots)
                if residency.is_open and not self.leaves_out_residents
                else (0, 0)
            )
        ]

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Raise MapMismatchError unless the attached maps are those that the loaded weights were trained with.

        Stamps belong to tables by their names. A map that does not know its registry version, because it comes from a
        checkpoint, learns it.
        """
        self._take_over(stamps_by_table(state, self.cce_tables()), "the checkpoint was")

    def _take_over(self, stamps: Mapping[str, MapStamp], what: str) -> None:
        for table, stamp in stamps.items():
            found = self.pointer_map(table)
            if stamp.digest != found.digest:
                raise MapMismatchError(
                    f"table {table!r}: {what} trained with the map {stamp.identity}, attached is "
                    f"{found.identity}; attach the checkpoint's own map first"
                )
        for table, stamp in stamps.items():
            found = self.pointer_map(table)
            if found.version is None and stamp.version is not None:
                self._look_up_by(table, found.published_as(stamp.version))  # the same map, whose phase goes on
        self._stamp(stamps)
