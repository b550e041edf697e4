"""Energy and cost against closed forms, on a GPU whose clock, work and sensors are simulated."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pynvml
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nas.config import CostConfig, MeasureConfig, validate
from nas.errors import UserError
from nas.hardware import nvml_facts
from nas.latency.cost import money_and_emissions
from nas.latency.energy import ENERGY_COLUMNS, Energy, EnergyTable, idle_watts, measure_energy
from nas.latency.measurement import Grid, _energy
from nas.latency.pool import LayerPool
from nas.latency.predictor import Workload
from nas.space import SearchSpace

NEVER = float("inf")


@dataclass
class FakeGpu:
    """A GPU with a queue of work, whose power is ``watts + watts_per_s · t``; every read of a sensor takes time."""

    watts: float = 300.0
    watts_per_s: float = 0.0
    call_s: float = 3e-3
    update_s: float = 0.02  # the energy counter moves only so often
    reset_s: float = NEVER  # then the counter starts again from zero
    energy_until_s: float = NEVER  # the counter fails then
    read_s: float = 5e-4
    now: float = 0.0
    queued_s: float = 0.0
    longest_queue_s: float = 0.0
    calls: int = 0
    synchronisations: int = 0
    opened: int = 0
    asked_for: list[object] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def call(self) -> None:
        self.calls += 1
        self.queued_s += self.call_s
        self.longest_queue_s = max(self.longest_queue_s, self.queued_s)

    def synchronise(self) -> None:
        self.synchronisations += 1
        self.now += self.queued_s
        self.queued_s = 0.0

    def measure(self, seconds: float = 5.0) -> Energy | None:
        return measure_energy(self.call, seconds, None, self.synchronise)

    def millijoules(self, _: object) -> int:
        self.now += self.read_s
        self.queued_s = max(0.0, self.queued_s - self.read_s)
        if self.now >= self.energy_until_s:
            raise pynvml.NVMLError_GpuIsLost()
        time = self.now // self.update_s * self.update_s
        time -= self.reset_s if time >= self.reset_s else 0.0
        return int(1e3 * (self.watts * time + self.watts_per_s * time**2 / 2))

    def open(self) -> None:
        self.opened += 1

    def close(self) -> None:
        self.opened -= 1

    def handle(self, which: object) -> object:
        self.asked_for.append(which)
        return "handle"


Plug = Callable[[FakeGpu], FakeGpu]


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Plug:
    """Puts a fake GPU where NVML finds it; it answers what is set here and NotSupported to all else."""

    def install(gpu: FakeGpu) -> FakeGpu:
        clock = SimpleNamespace(perf_counter=lambda: gpu.now, sleep=gpu.sleep)
        monkeypatch.setattr("nas.latency.energy.time", clock)
        for name in [name for name in dir(pynvml) if name.startswith("nvmlDeviceGet")]:
            monkeypatch.setattr(pynvml, name, refuse)
        answers: dict[str, Any] = {
            "nvmlInit": gpu.open,
            "nvmlShutdown": gpu.close,
            "nvmlSystemGetDriverVersion": lambda: "580.1",
            "nvmlDeviceGetHandleByIndex": gpu.handle,
            "nvmlDeviceGetHandleByUUID": gpu.handle,
            "nvmlDeviceGetTotalEnergyConsumption": gpu.millijoules,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)
        return gpu

    return install


def refuse(*_: object) -> None:
    raise pynvml.NVMLError_NotSupported()


def absent() -> None:
    raise pynvml.NVMLError_LibraryNotFound()


# Measuring


@pytest.mark.parametrize("call_s", [2e-4, 3e-3, 0.017, 0.07, 0.5])
@pytest.mark.parametrize("update_s", [1e-3, 0.02, 0.1])
def test_constant_power_is_found_to_a_hundredth_whatever_the_counter_and_the_call(
    plug: Plug, call_s: float, update_s: float
) -> None:
    gpu = plug(FakeGpu(call_s=call_s, update_s=update_s))
    energy = gpu.measure()
    assert energy is not None
    assert energy.watts == pytest.approx(300, rel=0.01)
    assert energy.joules_per_call == pytest.approx(300 * call_s, rel=0.01)
    assert energy.seconds >= 5
    assert energy.calls * call_s == pytest.approx(energy.seconds)
    assert energy.joules_per_call * energy.calls == pytest.approx(energy.watts * energy.seconds)
    assert gpu.opened == 0


def test_the_ends_of_the_counters_window_are_its_updates(plug: Plug) -> None:
    """With updates of 100 ms, the plain difference over a window of 5 s could be off by 2 %."""
    exact = plug(FakeGpu(update_s=0.1, call_s=0.01, read_s=0.0)).measure()
    assert exact is not None
    assert exact.watts == pytest.approx(300, rel=2e-3)


def test_the_queue_is_neither_empty_nor_long_while_it_measures(plug: Plug) -> None:
    gpu = plug(FakeGpu(call_s=2e-4))
    gpu.measure()
    assert gpu.longest_queue_s <= 0.05
    assert gpu.calls / gpu.synchronisations > 100


def test_the_warm_up_does_not_count(plug: Plug) -> None:
    gpu = plug(FakeGpu(watts=100, watts_per_s=50))
    energy = gpu.measure(10)
    assert energy is not None
    assert gpu.now - energy.seconds >= 2
    assert energy.watts == pytest.approx(100 + 50 * (gpu.now - energy.seconds / 2), rel=0.01)


@pytest.mark.parametrize(
    "change",
    [
        {"energy_until_s": 0},  # no such counter
        {"energy_until_s": 4},  # fails on the way
        {"update_s": 1e9},  # never moves
        {"reset_s": 4},  # the driver was loaded anew
    ],
    ids=["missing", "fails", "stuck", "reset"],
)
def test_a_counter_that_cannot_be_used_is_no_energy(plug: Plug, change: dict[str, float]) -> None:
    gpu = plug(replace(FakeGpu(), **change))  # type: ignore[arg-type]
    assert gpu.measure() is None
    assert (gpu.calls == 0) == (change == {"energy_until_s": 0})  # nothing is run in vain
    assert gpu.opened == 0


def test_a_counter_that_fails_at_the_very_end_counts(plug: Plug) -> None:
    energy = plug(FakeGpu(energy_until_s=6.8)).measure()
    assert energy is not None
    assert energy.watts == pytest.approx(300, rel=0.01)


def test_without_nvml_there_is_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    gpu = FakeGpu()
    assert gpu.measure() is None
    assert idle_watts(5, None) is None
    assert gpu.calls == gpu.now == 0


def test_nvml_is_let_go_when_a_call_fails(plug: Plug) -> None:
    gpu = plug(FakeGpu())
    with pytest.raises(ZeroDivisionError):
        measure_energy(lambda: 1 // 0, 5, None, gpu.synchronise)
    assert gpu.opened == 0


def test_idle_power(plug: Plug) -> None:
    gpu = plug(FakeGpu(watts=70, update_s=0.1))
    assert idle_watts(8, "u") == pytest.approx(70, rel=0.01)
    assert 8 <= gpu.now < 8.2
    assert gpu.asked_for == ["GPU-u"]


# NVML's facts


def test_facts_hold_all_that_nvml_answers(plug: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = plug(FakeGpu())
    answers: dict[str, Any] = {"Name": "NVIDIA Fake", "PowerManagementLimit": 700_000, "EccMode": [1, 0]}
    for key, value in answers.items():
        monkeypatch.setattr(pynvml, f"nvmlDeviceGet{key}", lambda *_, value=value: value)
    known = {"nvml_name": "NVIDIA Fake", "driver": "580.1", "power_limit_watts": 700, "ecc": True}
    assert nvml_facts("u") == known
    assert gpu.asked_for == ["GPU-u"]
    assert gpu.opened == 0


def test_what_nvml_refuses_is_left_out(plug: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    plug(FakeGpu())
    assert nvml_facts() == {"driver": "580.1"}
    monkeypatch.setattr(pynvml, "nvmlShutdown", refuse)
    assert nvml_facts() == {"driver": "580.1"}
    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    assert nvml_facts() == {}


def test_a_gpu_that_nvml_does_not_know_answers_nothing(plug: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = plug(FakeGpu())
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", refuse)
    assert nvml_facts("other") == {}
    assert gpu.opened == 0


# The table


def power(groups: int, batch: float) -> float:
    return 200 + 10 * groups + batch


@pytest.fixture
def linear() -> pd.DataFrame:
    """A table whose power is exactly linear."""
    rows = [[g, batch, 64, power(g, batch), 1.0, 5.0, 100, "energy counter"] for g in (1, 4) for batch in (16, 4)]
    return pd.DataFrame(rows, columns=ENERGY_COLUMNS).astype(object)


def test_power_is_linear_between_batches_and_constant_beyond(linear: pd.DataFrame, tmp_path: Path) -> None:
    linear.to_csv(tmp_path / "energy.csv", index=False)
    table = EnergyTable(tmp_path / "energy.csv")
    for batch in range(4, 17):
        assert table.watts(4, batch) == pytest.approx(power(4, batch))
    assert (table.watts(1, 1), table.watts(1, 999)) == (power(1, 4), power(1, 16))
    assert (table.knows([4, 1]), table.knows([1, 2])) == (True, False)


@pytest.mark.parametrize(
    ("row", "column", "value"), [(0, "watts", "hot"), (1, "watts", -3), (2, "calls", None), (3, "watts", "inf")]
)
def test_a_corrupt_table_is_refused(
    linear: pd.DataFrame, tmp_path: Path, row: int, column: str, value: str | int | None
) -> None:
    linear.loc[row, column] = value
    linear.to_csv(tmp_path / "energy.csv", index=False)
    with pytest.raises(UserError, match=rf"energy\.csv is corrupt \(.*row {row + 2}"):
        EnergyTable(tmp_path / "energy.csv")


# Cost


def test_costs_by_hand() -> None:
    config = CostConfig(price_per_hour=3.6, grid_kg_per_kwh=0.5)
    assert money_and_emissions(1000, 0.3, config, None) == pytest.approx(
        {"cost_per_million_tokens": 1.0, "kg_co2e_per_million_tokens": 0.3 / 3.6 * 0.5, "kg_co2e_per_year": 1314.0}
    )
    half = CostConfig(grid_kg_per_kwh=0.5, pue=1.2, utilisation=0.25)  # 75 W decoding and 75 W idling, on average
    assert money_and_emissions(1000, 0.3, half, 100) == pytest.approx(
        {"kg_co2e_per_million_tokens": 0.3 / 3.6 * 0.6, "kg_co2e_per_year": 0.150 * 8760 * 0.6}
    )


def test_what_is_unknown_is_left_out() -> None:
    priced = CostConfig(price_per_hour=2)
    assert money_and_emissions(10, None, CostConfig(), 50) == {}
    assert money_and_emissions(10, None, priced, None).keys() == {"cost_per_million_tokens"}
    assert money_and_emissions(10, 1, CostConfig(utilisation=0.5), None).keys() == {"kg_co2e_per_million_tokens"}
    assert money_and_emissions(10, 1, CostConfig(utilisation=0.0), 50)["kg_co2e_per_year"] == pytest.approx(
        0.05 * 8760 * 0.473
    )


POSITIVE = st.floats(1e-3, 1e6)
SHARE = st.floats(0, 1)


@given(rate=POSITIVE, joules=POSITIVE, price=POSITIVE, grid=POSITIVE, pue=st.floats(1, 3), busy=SHARE, idle=POSITIVE)
def test_cost_scales_as_it_must(
    rate: float, joules: float, price: float, grid: float, pue: float, busy: float, idle: float
) -> None:
    config = CostConfig(price, grid, pue, busy)
    result = money_and_emissions(rate, joules, config, idle)
    slower = money_and_emissions(rate / 2, joules, config, idle)
    assert slower["cost_per_million_tokens"] == pytest.approx(2 * result["cost_per_million_tokens"])
    assert slower["kg_co2e_per_million_tokens"] == result["kg_co2e_per_million_tokens"]
    cleaner = money_and_emissions(rate, joules, replace(config, grid_kg_per_kwh=grid / 2), idle)
    for key in ("kg_co2e_per_million_tokens", "kg_co2e_per_year"):
        assert cleaner[key] == pytest.approx(result[key] / 2)
    always = money_and_emissions(rate, joules, replace(config, utilisation=1.0), None)["kg_co2e_per_year"]
    never = money_and_emissions(rate, joules, replace(config, utilisation=0.0), idle)["kg_co2e_per_year"]
    assert result["kg_co2e_per_year"] == pytest.approx(busy * always + (1 - busy) * never)
    million_tokens_a_year = rate * 8760 * 3600 / 1e6
    assert always == pytest.approx(million_tokens_a_year * result["kg_co2e_per_million_tokens"])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("price_per_hour", 0.0, "must be positive"),
        ("price_per_hour", -1.0, "must be positive"),
        ("grid_kg_per_kwh", -0.1, "must be 0 or more"),
        ("pue", 0.9, "must be 1 or more"),
        ("pue", float("nan"), "must be 1 or more"),
        ("utilisation", 1.1, "must lie between 0 and 1"),
        ("utilisation", -0.1, "must lie between 0 and 1"),
    ],
)
def test_a_cost_that_cannot_be_is_refused(key: str, value: float, words: str) -> None:
    with pytest.raises(UserError, match=rf"^cost\.{key} is {value} but {words}$"):
        validate(CostConfig(**{key: value}), "cost.")


def test_the_default_costs_are_valid() -> None:
    validate(CostConfig())
    validate(CostConfig(price_per_hour=2.5, grid_kg_per_kwh=0.0, pue=1.0, utilisation=0.0))


def test_power_is_read_at_the_given_batches_or_the_largest_that_fit(
    micro: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(call: Callable[[], torch.Tensor], *_: object) -> Energy:
        tokens = call()
        assert (tokens.dim(), tokens.dtype) == (1, torch.int64)  # chosen from the logits, as in serving
        rows = len(tokens)
        return Energy(300.0, 2.0 * rows, 1.0, 5)

    monkeypatch.setattr("nas.latency.measurement.measure_energy", planted)
    grid, workload = Grid((1, 6), (4, 16), (2, 4)), Workload(6, 16, 4, "fp32", "eager")
    pool = LayerPool(micro, "fp32", "eager", torch.device("cpu"), grid.points(micro), 2**30)
    pool._room = 3 * 4 * 4 * 16 * 8  # as if memory ended there: layers, batch, groups, length, head width
    table = _energy(micro, grid, workload, MeasureConfig(), pool, "u")
    assert table is not None
    measured = [(row.groups, row.batch, row.length, row.joules_per_step) for row in table.itertuples()]
    assert measured == [
        (groups, batch, 16, 2.0 * batch) for groups, most in ((1, 6), (2, 6), (4, 4)) for batch in (1, most)
    ]
