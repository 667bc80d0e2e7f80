"""Comparison of values: `<attr_k><q><e_i><mask><e_j>` is answered `<attr_k_y>`, y = 0 smaller, 1 equal, 2 larger.

Grokked Transformers (arXiv 2405.15071), section 4 and its published generator. All values are in training as atomic
facts (`<e_i><attr_k>` -> `<v>`); pairs of out-of-distribution entities are only tested, mixed pairs are not used.
"""

from __future__ import annotations

from numpy.random import RandomState
from pydantic import Field, model_validator

from groundswell.config import ConfigError
from groundswell.protocols import Answer, Dataset, Split
from tasks.attribute_world import AttributeTask, AttributeWorld
from tasks.examples import answer_split, make_dataset, sample
from tasks.vocabulary import IntArray


class Comparison(AttributeTask):
    """At one seed, all phi share the values and the tests, and their training sets nest."""

    phi: float = Field(7.2, gt=0, description="training comparisons for each in-distribution atomic fact")
    predict_stop: bool = Field(True, description="train on </a> after the answer too, as the paper does")

    @model_validator(mode="after")
    def _check_phi(self) -> Comparison:
        largest = (self._num_id - 1) * (1 - self.iid_fraction)
        if self.phi > largest:
            raise ValueError(self._phi_error(largest))
        return self

    def _phi_error(self, largest: float) -> str:
        return (
            f"task.phi {self.phi:g} is more than the world holds: at most about {largest:.4g} with {self._num_id} "
            "in-distribution entities; lower task.phi or raise task.num_entities"
        )

    @property
    def max_length(self) -> int:
        return 5 + self.predict_stop

    @property
    def num_answers(self) -> int:
        return 1 + self.predict_stop

    def build(self) -> Dataset:
        """Raises ConfigError if this seed's world has too few pairs for phi."""
        random = RandomState(self.seed)
        world = self._draw_world(random, cross=False)
        id_atomic, ood_atomic = world.atomic(ood=False), world.atomic(ood=True)
        wanted = round(self.phi * len(id_atomic))
        if wanted > len(world.pool):
            raise ConfigError(self._phi_error(len(world.pool) / max(len(id_atomic), 1)))
        # The samples before the training set do not depend on phi, so that runs of different phi share them.
        evaluation = {
            "test_inferred_ood": self._pairs(world, world.both_ood.sample(self.test_size, random)),
            "id_atomic": self._atomic(sample(id_atomic, self.test_size, random)),
            "ood_atomic": self._atomic(sample(ood_atomic, self.test_size, random)),
            "test_inferred_iid": self._pairs(world, world.iid.sample(self.test_size, random)),
        }
        inferred = world.pool.sample(wanted, random)
        evaluation["train_inferred"] = self._pairs(world, sample(inferred, self.test_size, random))
        train = {
            "id_atomic": self._atomic(id_atomic),
            "ood_atomic": self._atomic(ood_atomic),
            "train_inferred": self._pairs(world, inferred),
        }
        candidates = {
            "train_inferred": len(world.pool),
            "test_inferred_iid": len(world.iid),
            "test_inferred_ood": len(world.both_ood),
        }
        return make_dataset(
            self, self.vocabulary(), train, evaluation, answer=Answer(slice(0, 1)), candidates=candidates
        )

    def _atomic(self, facts: IntArray) -> Split:
        entity, attribute, value = self._atomic_ids(facts)
        return self._split(len(facts), [entity, attribute, value])

    def _pairs(self, world: AttributeWorld, facts: IntArray) -> Split:
        attribute, first, second, label = self._pair_ids(facts, world.labels(facts))
        return self._split(len(facts), [attribute, "<q>", first, "<mask>", second, label])

    def _split(self, count: int, columns: list[IntArray | str]) -> Split:
        stop = ["</a>"] if self.predict_stop else []
        rows = self._token_rows(count, [*columns, *stop])
        return answer_split(rows, len(columns) - 1, self.max_length, pad=self.vocab_size - 1)
