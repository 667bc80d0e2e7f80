"""The configuration tree: round trips, identity, overrides, one-line errors."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from groundswell.config import Component, Config, ConfigError


class Engine(Component):
    packable = frozenset({"power"})
    power: float = Field(1.0, gt=0)


class Diesel(Engine):
    cylinders: int = 4


class Car(Config):
    engine: Engine = Engine()
    wheels: int = Field(4, gt=0)
    colours: tuple[str, ...] = ("red",)


def test_polymorphic_part_survives_json_and_yaml():
    car = Car(engine=Diesel(cylinders=6, power=1e-5), colours=("red", "blue"))
    for text in (car.to_json(), car.to_yaml(), car.canonical_json()):
        again = Car.from_text(text)
        assert again == car
        assert isinstance(again.engine, Diesel)
        assert again.identity == car.identity


@given(power=st.floats(min_value=1e-300, max_value=1e300), wheels=st.integers(1, 2**60))
def test_every_number_survives(power, wheels):
    car = Car(engine=Engine(power=power), wheels=wheels)
    assert Car.from_text(car.to_json()) == car
    assert Car.from_text(car.to_yaml()) == car


def test_identity_does_not_depend_on_key_order_but_on_every_value():
    shuffled = {"wheels": 4, "engine": {"power": 1.0, "class": f"{__name__}.Engine"}}
    assert Car.from_dict(shuffled).identity == Car().identity
    assert Car(wheels=3).identity != Car().identity
    assert Car(engine=Diesel()).identity != Car().identity


def test_override_reads_text_as_json_where_it_is_json():
    car = Car().with_overrides({"engine.power": "3e-4", "wheels": "3", "colours": '["green"]'})
    assert (car.engine.power, car.wheels, car.colours) == (3e-4, 3, ("green",))
    assert Car().wheels == 4  # the original is untouched


def test_override_replaces_a_whole_part():
    assert Car().with_overrides({"engine": Diesel(cylinders=2)}).engine == Diesel(cylinders=2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"engine.powr": 1}, "engine.powr: 'engine' has no field 'powr'; did you mean 'power'?"),
        ({"engine.power": -1}, "engine.power: Input should be greater than 0, got -1"),
        ({"wheels": "many"}, "wheels: Input should be a valid integer"),
        ({"wheels.spokes": 3}, "wheels.spokes: 'wheels' has no field 'spokes'; 'wheels' has no parts"),
        ({"engine": {"class": "os.path"}}, "engine: 'os.path' is not a Engine"),
        ({"engine": {"class": "nowhere.Engine"}}, "engine: no class at import path 'nowhere.Engine'"),
        ({"engine": {"class": f"{__name__}.Car"}}, "is not a Engine"),
    ],
)
def test_wrong_override_is_one_line_that_names_the_field(overrides, message):
    with pytest.raises(ConfigError, match="^[^\n]*$") as error:
        Car().with_overrides(overrides)
    assert message in str(error.value)


def test_unknown_field_and_unreadable_text():
    with pytest.raises(ConfigError, match="speed: no such field"):
        Car.from_text('{"speed": 3}')
    with pytest.raises(ConfigError, match="neither JSON nor YAML"):
        Car.from_text("{")
    with pytest.raises(ConfigError, match="missing.json"):
        Car.from_file("missing.json")


def test_flatten_names_every_leaf():
    flat = Car(engine=Diesel()).flatten()
    assert flat["engine.cylinders"] == 4
    assert flat["engine.class"] == f"{__name__}.Diesel"
    assert json.dumps(flat)


def test_a_class_override_replaces_the_part(tiny):
    other = tiny.with_overrides({"task.num_entities": 20, "task.class": "tasks.comparison.Comparison"})
    assert type(other.task).__name__ == "Comparison"
    assert other.task.num_entities == 20
    assert other.model == tiny.model
    with pytest.raises(ConfigError, match="task.modulus: no such field"):
        tiny.with_overrides({"task.class": "tasks.comparison.Comparison", "task.modulus": 5})
    with pytest.raises(ConfigError, match=r"task: no class at import path 'tasks.nothing.Here'"):
        tiny.with_overrides({"task.class": "tasks.nothing.Here"})
    with pytest.raises(ConfigError, match="is not a Task"):
        tiny.with_overrides({"task.class": "models.decoder.Decoder"})
    with pytest.raises(ConfigError, match="has no field 'tsk'"):
        tiny.with_overrides({"tsk.class": "models.decoder.Decoder"})
