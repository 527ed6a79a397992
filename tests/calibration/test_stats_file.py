"""Statistics files: reading returns what was written, in both formats, and other files are refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlinear.calibration.stats import InputStats
from qlinear.calibration.stats_file import (
    STATISTICS,
    CalibrationStats,
    combine,
    input_name,
    load_statistics,
    require_writable,
    save_statistics,
)
from qlinear.errors import DataError, NumericsError, OutputError
from qlinear.tracing.experiment import Product, Trace
from qlinear.tracing.trace import Weight

Q, K, UP = "layers.0.attn.q", "layers.0.attn.k", "layers.0.mlp.up"


def stats_of(x: Tensor) -> InputStats:
    """The statistics of x (tokens, in), by definition."""
    return InputStats(
        x.abs().amax(0), x.abs().mean(0), x.amin(0), x.amax(0), x.mean(0), len(x), x.new_empty(0, x.shape[1])
    )


def random_stats(seed: int = 0, width: int = 5, tokens: int = 7) -> InputStats:
    return stats_of(torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)))


def equal(a: InputStats, b: InputStats, tokens: bool = True) -> bool:
    vectors = all(torch.equal(getattr(a, statistic), getattr(b, statistic)) for statistic in STATISTICS)
    return vectors and (not tokens or a.tokens == b.tokens) and a.sample.shape == b.sample.shape


@given(
    widths=st.dictionaries(
        st.text("abc.01", min_size=1), st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1
    ),
    idle=st.frozensets(st.text("xyz", min_size=1)),
)
@settings(max_examples=30)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_reading_returns_what_was_written(
    suffix: str,
    widths: dict[str, tuple[int, int]],
    idle: frozenset[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("stats") / f"inputs_stats{suffix}"
    inputs = {name: random_stats(i, *size) for i, (name, size) in enumerate(widths.items())}
    save_statistics(path, CalibrationStats(inputs, idle, "abc"))
    back = load_statistics(path, "abc")
    assert set(back.inputs) == set(inputs)
    knows_tokens = suffix == ".safetensors"
    assert all(equal(back.inputs[name], inputs[name], knows_tokens) for name in inputs)
    if knows_tokens:
        assert (back.idle, back.fingerprint) == (idle, "abc")


def test_shared_statistics_are_stored_once_and_stay_shared(tmp_path: Path) -> None:
    shared = random_stats()
    save_statistics(tmp_path / "s.safetensors", CalibrationStats({Q: shared, K: shared, UP: random_stats(1)}))
    assert len(load_file(tmp_path / "s.safetensors")) == 2 * len(STATISTICS)
    inputs = load_statistics(tmp_path / "s.safetensors").inputs
    assert inputs[Q] is inputs[K]
    assert inputs[Q] is not inputs[UP]


def test_the_pickle_is_a_table_of_vectors_for_each_statistic(tmp_path: Path) -> None:
    stats = random_stats()
    save_statistics(tmp_path / "inputs_stats.pth", CalibrationStats({Q: stats, K: stats}))
    tables = torch.load(tmp_path / "inputs_stats.pth", weights_only=True)
    assert set(tables) == {"absmax", "absmean", "max", "mean", "min"}
    for statistic, table in tables.items():
        assert list(table) == [Q, K]
        assert torch.equal(table[Q], getattr(stats, statistic))


def lmdeploy_tables() -> dict[str, dict[str, Tensor]]:
    """Statistics in half precision, as LMDeploy writes them."""
    stats = random_stats()
    return {statistic: {Q: getattr(stats, statistic).half()} for statistic in STATISTICS}


def test_lmdeploys_half_precision_and_unused_observers_are_read(tmp_path: Path) -> None:
    tables = lmdeploy_tables()
    start = {"absmax": 0.0, "absmean": 0.0, "mean": 0.0, "min": torch.inf, "max": -torch.inf}
    for statistic, value in start.items():
        tables[statistic]["layers.0.experts.3.w1"] = torch.full((5,), value).half()
    torch.save(tables | {"ratios": {}}, tmp_path / "inputs_stats.pth")
    loaded = load_statistics(tmp_path / "inputs_stats.pth", "any model")
    assert set(loaded.inputs) == {Q}
    assert loaded.idle == {"layers.0.experts.3.w1"}
    assert all(getattr(loaded.inputs[Q], statistic).dtype == torch.float32 for statistic in STATISTICS)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**16))
def test_merged_statistics_are_those_of_all_tokens(a: int, b: int, seed: int) -> None:
    x = torch.randn(a + b, 3, generator=torch.Generator().manual_seed(seed))
    both, whole = combine(stats_of(x[:a]), stats_of(x[a:])), stats_of(x)
    assert both.tokens == whole.tokens
    for statistic in STATISTICS:
        torch.testing.assert_close(getattr(both, statistic), getattr(whole, statistic))


# --- weights of a block ---


def trace_of(*weights: tuple[Weight, Tensor]) -> Trace:
    trace = Trace()
    trace.products = [Product(w, x, x, None, (x.data_ptr(), x.shape), frozenset()) for w, x in weights]
    return trace


BLOCK = "layers.0"
X = torch.zeros(2, 5)


def test_weights_are_named_by_module_parameter_or_index() -> None:
    assert input_name(BLOCK, Weight("attn.q.weight")) == "layers.0.attn.q"
    assert input_name(BLOCK, Weight("mixer.W", transposed=True)) == "layers.0.mixer.W"
    assert input_name(BLOCK, Weight("experts.gate_up", index=3)) == "layers.0.experts.gate_up.3"
    assert input_name("head", Weight("weight")) == "head"
    assert input_name("", Weight("attn.q.weight")) == "attn.q"


def test_one_named_weight_is_enough_for_all_that_read_its_tensor() -> None:
    q, k, up = (Weight(f"{name}.weight") for name in ("attn.q", "attn.k", "mlp.up"))
    other = torch.zeros(2, 5)
    loaded = CalibrationStats({K: random_stats(), UP: random_stats(1)}).of_block(
        BLOCK, trace_of((q, X), (k, X), (up, other))
    )
    assert loaded[q] is loaded[k]
    assert loaded[up] is not loaded[q]


def test_weights_that_no_token_reached_are_left_out() -> None:
    expert, router = Weight("experts.down", index=1), Weight("router.weight")
    statistics = CalibrationStats({}, frozenset({"layers.0.router"}))
    assert statistics.of_block(BLOCK, trace_of((expert, X), (router, torch.zeros(2, 5)))) == {}


def test_a_missing_module_and_a_wrong_width_are_named() -> None:
    trace = trace_of((Weight("attn.q.weight"), X))
    with pytest.raises(DataError, match=r"nothing of layers\.0\.attn\.q: .*qlinear calibrate"):
        CalibrationStats({UP: random_stats()}).of_block(BLOCK, trace)
    with pytest.raises(DataError, match=r"layers\.0\.attn\.q are of 9 channels; the weight reads 5"):
        CalibrationStats({Q: random_stats(width=9)}).of_block(BLOCK, trace)


# --- files with other content ---


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    save_statistics(tmp_path / "s.safetensors", CalibrationStats({Q: random_stats()}, fingerprint="abc"))
    with pytest.raises(DataError, match="of another model"):
        load_statistics(tmp_path / "s.safetensors", "xyz")
    assert load_statistics(tmp_path / "s.safetensors").fingerprint == "abc"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_nan_is_named_and_counted(suffix: str, statistic: str, value: float, tmp_path: Path) -> None:
    stats = random_stats()
    getattr(stats, statistic)[1:3] = value
    save_statistics(tmp_path / f"s{suffix}", CalibrationStats({Q: stats}))
    with pytest.raises(
        NumericsError, match=rf"2 NaN or infinite of 5 channels in the {statistic} of layers\.0\.attn\.q"
    ):
        load_statistics(tmp_path / f"s{suffix}")


def test_vectors_of_several_widths_are_refused(tmp_path: Path) -> None:
    tables = lmdeploy_tables()
    tables["mean"][Q] = torch.zeros(4)
    torch.save(tables, tmp_path / "s.pth")
    with pytest.raises(DataError, match=r"absmax of 5 channels but mean of 4 for layers\.0\.attn\.q"):
        load_statistics(tmp_path / "s.pth")


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"absmax": {Q: torch.ones(5)}},
        {key: {Q: torch.ones(5, 5)} for key in STATISTICS},
        {key: {Q: 1.0} for key in STATISTICS},
        {key: {Q: torch.ones(5)} for key in STATISTICS} | {"mean": {}},
        dict.fromkeys(STATISTICS, torch.ones(5)),
    ],
)
def test_another_pickle_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "s.pth")
    with pytest.raises(DataError, match="must hold"):
        load_statistics(tmp_path / "s.pth")


class Code:
    """A class that a pickle must not be able to load."""


def test_a_pickle_with_code_and_damaged_files_are_refused(tmp_path: Path) -> None:
    torch.save({"absmax": Code()}, tmp_path / "code.pth")
    (tmp_path / "damaged.pth").write_bytes(b"abc")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "damaged.safetensors").write_bytes(b"abc")
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    for name in ("code.pth", "damaged.pth", "empty.pth"):
        with pytest.raises(DataError, match="weights_only=True"):
            load_statistics(tmp_path / name)
    with pytest.raises(DataError, match="is damaged"):
        load_statistics(tmp_path / "damaged.safetensors")
    with pytest.raises(DataError, match="holds no statistics"):
        load_statistics(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("name", ["stats", "stats.json", "stats.bin"])
def test_an_unknown_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"are \.safetensors, or \.pth"):
        load_statistics(tmp_path / name)
    with pytest.raises(DataError, match=r"are \.safetensors, or \.pth"):
        require_writable(tmp_path / name)


def test_unwritable_paths_are_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        load_statistics(tmp_path / "s.pth")
    with pytest.raises(OutputError, match="there is no folder"):
        require_writable(tmp_path / "missing" / "s.pth")
    (tmp_path / "s.pth").write_text(json.dumps({}))
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(OutputError, match="--overwrite"):
        require_writable(tmp_path / "s.pth")
    require_writable(tmp_path / "s.pth", overwrite=True)
    with pytest.raises(OutputError, match="exists"):
        require_writable(tmp_path / "folder.pth", overwrite=True)
