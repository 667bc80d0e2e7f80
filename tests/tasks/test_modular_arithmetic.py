import pytest

from groundswell.config import ConfigError
from tasks.modular_arithmetic import ModularArithmetic, is_prime

RULES = {
    "add": lambda a, b, c, p: (a + b) % p == c,
    "subtract": lambda a, b, c, p: (a - b) % p == c,
    "multiply": lambda a, b, c, p: (a * b) % p == c,
    "divide": lambda a, b, c, p: (c * b) % p == a,
}


@pytest.mark.parametrize("operation", RULES)
def test_every_pair_once_with_its_result(operation: str) -> None:
    task = ModularArithmetic(modulus=13, operation=operation, train_fraction=0.3, seed=5)
    dataset = task.build()
    rows = [
        (a, b, c)
        for split in (dataset.train, dataset.evaluation["test"])
        for (a, b), (c,) in zip(split.tokens.tolist(), split.targets.tolist(), strict=True)
    ]
    divisors = range(1, 13) if operation == "divide" else range(13)
    assert sorted(row[:2] for row in rows) == [(a, b) for a in range(13) for b in divisors]
    assert all(RULES[operation](*row, 13) for row in rows)
    assert len(dataset.train) == round(0.3 * len(rows))
    assert (dataset.train.positions == 1).all()
    assert dataset.vocabulary[3] == "<3>"


def test_train_is_a_random_share() -> None:
    first = ModularArithmetic(modulus=23).build().train.tokens
    assert len(first[:, 0].unique()) == 23
    assert not first.equal(ModularArithmetic(modulus=23, seed=1).build().train.tokens)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"modulus": 12, "operation": "divide"}, r"task\.operation divide needs a prime task\.modulus, not 12"),
        ({"modulus": 3, "train_fraction": 0.01}, r"task\.train_fraction 0\.01 leaves"),
        ({"operation": "power"}, r"operation: Input should be 'add'"),
    ],
)
def test_impossible_fields_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModularArithmetic.from_dict(fields)


def test_primes() -> None:
    assert [n for n in range(30) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
