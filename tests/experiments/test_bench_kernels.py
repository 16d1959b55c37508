"""The kernels' benchmarks: what is counted and derived by hand, and the smoke form of what is measured."""

import csv
import dataclasses
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.benchmarks import gpu_check, kernel_steps, kernel_table, roofline, timing
from experiments.benchmarks import kernels as bench_kernels
from experiments.benchmarks.attention_cases import attention, choice, shared_prefix
from experiments.benchmarks.kernel_cases import Variant
from experiments.benchmarks.mlp_cases import pruned_mlp, rounding
from pallas_kernels import cost_model
from sol_jax.errors import UserError

HLO = """\
HloModule made_up

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %z = f32[4]{0} custom-call(%y), custom_call_target="__gpu$xla.gpu.triton"
  ROOT %t = (s32[], f32[4]{0}) tuple(%x, %z)
}

%graph (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} copy(%a)
}

ENTRY %main (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %g = f32[4]{0} call(%q), to_apply=%graph
  %w = (s32[], /*index=1*/f32[4]{0}) while(%g), condition=%cond, body=%body, backend_config={"known_trip_\
count":{"n":"7"}}
  %s = ((f32[4]{0}), f32[4]{0}) copy-start(%g)
  ROOT %d = f32[4]{0} copy-done(%s)
}
"""


def test_launches_are_counted():
    """A call of one copy, seven turns of two kernels, a copy that is started and awaited."""
    assert timing.count_launches(HLO) == 1 + 7 * 2 + 1
    assert timing.count_launches(HLO.replace("known_trip_count", "unknown")) == 1 + 2 + 1


def test_launches_of_a_real_program():
    """A loop longer by three of the same turns launches three turns more."""

    def launches(turns: int) -> float:
        looped = jax.jit(lambda x: lax.fori_loop(0, turns, lambda i, y: jnp.sin(y @ y), x))
        return timing.count_launches(looped.lower(jnp.ones((8, 8))).compile().as_text())

    turn = launches(8) - launches(7)
    assert turn >= 1
    assert launches(11) - launches(8) == 3 * turn


def test_slopes_cancel_what_does_not_grow(monkeypatch):
    """On a made-up clock a chain takes 5 s and 0.25 s a call."""
    clock = [0.0]

    def chain(length: int):
        def run():
            clock[0] += 5 + 0.25 * length

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    seconds = timing.measure({"a": timing.Chains(chain(4), chain(8), 4, 1.0)}, 5)
    assert seconds == {"a": pytest.approx(0.25)}
    flat = timing.Chains(chain(4), chain(4), 4, 1.0)
    assert math.isnan(timing.measure({"flat": flat}, 3)["flat"])
    assert timing.walls({"a": chain(4)}, 3) == {"a": pytest.approx(6.0)}


def test_columns_by_hand():
    rates = timing.DeviceRates(copy=4e12, matmul=1e15)
    found = kernel_table.speeds(1e-3, 2e9, 3e11, rates, 3e-3)
    assert found == pytest.approx(
        {
            "seconds": 1e-3, "gb_per_second": 2000.0, "share_of_copy": 0.5, "share_of_matmul": 0.3,
            "speedup": 3.0,
        }
    )  # fmt: skip
    assert kernel_table.speeds(math.nan, 2e9, 3e11, rates, 3e-3) == {"seconds": None}
    assert kernel_table.speeds(1e-3, 2e9, 3e11, rates, math.nan)["speedup"] is None


def test_nan_is_a_difference():
    assert kernel_table.difference([1.0, 3.0], np.array([1.5, 4.0])) == pytest.approx(0.5 / 1.5)
    assert kernel_table.difference([np.nan, 3.0], np.array([1.5, 3.0])) == math.inf


TINY = bench_kernels.TINY
CASES = {
    "attend": lambda dtype: attention(TINY, (0.3, 1.0), dtype, smoke=True),
    "gated_hidden": lambda dtype: pruned_mlp(TINY, 1, (0.4,), dtype, smoke=True),
    "shared_prefix": lambda dtype: shared_prefix(TINY, 3, (0.5,), dtype, smoke=True),
    "select_pages": lambda dtype: choice(TINY, (0.3,), dtype, smoke=True),
    "quantize_residual": lambda dtype: rounding(TINY, 2, (3, 16), smoke=True),
}


@pytest.mark.parametrize("op", CASES)
def test_every_implementation_answers_right(op):
    """In float32, against float64; a wrong answer (another buffer's) is far off."""
    case = CASES[op]("float32")
    rows = kernel_table.run_case(case, 0, None)
    assert {row["implementation"] for row in rows} >= {"xla", "pallas"}
    for row in rows:
        assert not row["note"]
        assert row["error"] < 1e-5
    inputs = next(iter(case.actions.values()))
    other = case.exact(inputs[1], case.buffers[1], False)
    variant = case.variants["xla"]
    assert kernel_table.difference(variant.first(variant.call(inputs[0], case.buffers[0])), other) > 0.01


def test_kept_shares_and_bytes():
    """Of 8 pages 3 for each of 2 heads of a group: at least 3/8, at most 6/8 are read; of 64 channels 26."""
    case = attention(TINY, (0.3, 1.0), "float32", smoke=True)
    kept = {action: case.kept(inputs[0], case.buffers[0]) for action, inputs in case.actions.items()}
    assert 3 / 8 <= kept["keep=0.3"] <= 6 / 8
    assert kept["keep=1.0"] == 1
    # Two sequences, two key/value heads of 64 keys and values of 16; queries and results of four heads.
    kv, small = 2 * 2 * 2 * 64 * 16 * 4, 2 * 2 * 4 * 16 * 4
    index = kv / 8
    assert case.variants["pallas"].work(0.5).bytes == kv / 2 + index + small
    assert case.variants["pallas"].work(1.0).bytes == kv + small
    assert case.variants["xla"].work(0.5).bytes == kv + index + small
    pruned = pruned_mlp(TINY, 1, (0.4,), "float32", smoke=True)
    assert pruned.kept(pruned.actions["keep=0.4"][0], pruned.buffers[0]) == 26 / 64


def test_a_variant_that_fails_says_why():
    case = rounding(TINY, 2, (3,), smoke=True)

    def broken(x, buffer):
        raise RuntimeError("no such\n  library")

    case.variants["broken"] = Variant(broken, lambda share: None)
    rows = {row["implementation"]: row for row in kernel_table.run_case(case, 0, None)}
    assert rows["broken"]["note"] == "RuntimeError: no such library"
    assert rows["xla"]["error"] < 1e-5
    assert not any(map(kernel_table.is_wrong, rows.values()))


def test_a_wrong_answer_is_noted_whether_timed_or_not(monkeypatch, tmp_path):
    """And fails the run: the kernel's is off by 2e-5 in float32; XLA's own may be."""
    case = rounding(TINY, 2, (3,), smoke=True)
    right = case.variants["xla"].call

    def off(x, gain_D):
        return tuple(out + 2e-5 for out in right(x, gain_D))

    for name in ("xla", "pallas"):
        case.variants[name] = dataclasses.replace(case.variants[name], call=off)
    for rates, rounds in ((None, 0), (timing.DeviceRates(1e9, 1e9), 1)):
        rows = {row["implementation"]: row for row in kernel_table.run_case(case, rounds, rates)}
        assert rows["pallas"]["note"] == "WRONG: the error is above 1e-05"
        assert [name for name, row in rows.items() if kernel_table.is_wrong(row)] == ["pallas"]
    monkeypatch.setattr(bench_kernels, "verified", lambda smoke: [("made up", lambda: case)])
    assert bench_kernels.verify(True, math.inf) == 1
    assert bench_kernels.verify(True, -math.inf) == gpu_check.INCOMPLETE
    monkeypatch.setattr(bench_kernels, "cases", lambda smoke: [("made up", lambda: case)])
    monkeypatch.setattr(
        sys, "argv", ["bench", "--smoke", "--only", "made up", "--csv", str(tmp_path / "a.csv")]
    )
    with pytest.raises(SystemExit, match="1 answers are wrong: see the column note"):
        bench_kernels.main()


def test_what_is_measured_is_of_the_table():
    """Every model, a batch of 128 too; nothing is allocated."""
    labels = " ".join(label for label, _ in bench_kernels.cases(False) + kernel_steps.jobs(False))
    for name in ("smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"):
        assert f"attend {name}" in labels
        assert f"gated_hidden {name}" in labels
        assert f"decode_step {name}" in labels
    assert "attend llama-3.2-1b-128x8192" in labels


def test_the_cache_that_a_step_reads():
    """A kernel's: the pages that some head of a group keeps, no more than if each kept others (52 of 512)."""
    name, heads = "llama-3.1-8b", 4
    assert kernel_steps.read_share("xla", 0.1, 8, 32768, name) == 1.0
    assert kernel_steps.read_share("auto", 0.1, 1, 8192, name) == 1.0  # auto takes XLA here
    union = kernel_steps.read_share("pallas", 0.1, 8, 32768, name)
    assert 0.1 < union <= 1.1 * (1 - 0.9**heads)
    cfg, using = kernel_steps.MODELS[name], kernel_steps.axes("xla")
    levels = (0.1, 1.0, 16.0)
    worst, realised = (kernel_steps.step_work(levels, 1, 8192, cfg, using, read) for read in (None, union))
    cache = cfg.num_layers * 2 * cfg.num_kv_heads * cfg.head_size * 8192 * 2
    assert worst.bytes - realised.bytes == pytest.approx((4 * 52 / 512 - union) * cache)
    assert worst.flops == realised.flops


def test_steps_take_the_work_of_their_rows():
    """One row reads what `costs` says; two rows 1 - 0.6**2 of gate and up at keep 0.4; four all of it."""
    cfg, using = kernel_steps.MODELS["llama-3.1-8b"], kernel_steps.axes("xla")
    levels = (1.0, 0.4, 16.0)
    gate_up = cfg.num_layers * 2 * cfg.hidden_size * cfg.ffn_size * 2
    one, two, four = (kernel_steps.step_work(levels, n, 1024, cfg, using).bytes for n in (1, 2, 4))
    dense = [kernel_steps.step_work(kernel_steps.TOP, n, 1024, cfg, using).bytes for n in (1, 2, 4)]
    assert dense[0] - one == pytest.approx(0.6 * gate_up, rel=1e-3)
    assert dense[1] - two == pytest.approx(0.36 * gate_up, rel=2e-3)
    assert dense[2] == pytest.approx(four)


def test_smoke_writes_a_table_that_a_cost_model_is_fitted_to(tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernels_here.csv"
    arguments = ["bench", "--smoke", "--only", "quantize", "--csv", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    bench_kernels.main()
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"rates", "quantize_residual"}
    assert all(row["jax"] == jax.__version__ and row["device"] and row["date"] for row in rows)
    made_up = cost_model.CostModel("made up", 1 / 2e12, 0.0, 4e-6, 9.0)
    for row in rows[2:]:  # times of this machine are noise
        work = (float(row[column]) for column in ("bytes", "flops", "launches"))
        row["seconds"] = str(made_up.seconds(*work))
        row["bytes"] = str(float(row["bytes"]))
    rows.append(rows[-1] | {"op": "decode_step", "implementation": "pallas", "layers": "2", "bytes": "1e12"})
    rows[-1]["seconds"] = str(made_up.seconds(1e12, 0, float(rows[-1]["launches"])))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(sys, "argv", ["roofline", "--csv", str(path), "--figures", str(tmp_path)])
    roofline.main()
    model = cost_model.load(tmp_path / "cost_model_here.json")
    assert model.seconds_per_byte == pytest.approx(1 / 2e12)
    assert model.seconds_per_launch == pytest.approx(4e-6)
    assert model.launches_per_layer == float(rows[-1]["launches"]) / 2
    assert "of shapes held out from the fit no rows" in capsys.readouterr().out
    for kind in ("roofline", "actions", "prediction"):
        assert (tmp_path / f"{kind}_here.png").stat().st_size > 1000


def test_shapes_are_held_out_of_the_fit():
    """The last of an operation's shapes: ten times what the bytes of the others let expect."""
    row = {"op": "attend", "launches": "1", "implementation": "pallas", "flops": "0", "device": "made up"}
    rows = [row | {"shape": f"s{n}", "bytes": str(1e6 * n), "seconds": str(n)} for n in (1, 2, 2, 3, 3)]
    rows += [row | {"op": "bounds", "shape": "s3", "bytes": "1e6", "seconds": "1"}]
    for unseen in rows[3:5]:
        unseen["seconds"] = "30"
    seen, unseen = roofline.held_out(rows)
    assert (seen, unseen) == ([*rows[:3], rows[5]], rows[3:5])
    model = roofline.fit(seen)
    assert [roofline.predict(model, row) for row in unseen] == pytest.approx([3, 3], rel=1e-6)
    assert roofline.misses(model, unseen) == "90% over 2 rows"


def test_bad_tables(tmp_path):
    with pytest.raises(UserError, match=r"no.csv: No such file.*experiments\.benchmarks\.kernels writes it"):
        roofline.read(tmp_path / "no.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a table of kernels"):
        roofline.read(tmp_path / "other.csv")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match=r"there is no GPU here \(jax sees cpu\)"):
        bench_kernels.main()
    with pytest.raises(SystemExit, match="make gpu-check needs a GPU, and there is none here"):
        gpu_check.main()


@pytest.mark.parametrize(
    ("missing", "arguments", "tests"),
    [
        ((), [], "tests/kernels"),
        (("pytest",), [], "--verify"),
        (("hypothesis",), ["--csv", "here.csv"], "--verify"),
        ((), ["--smoke"], "--verify"),
    ],
)
def test_gpu_check_tests_and_then_measures(missing, arguments, tests, monkeypatch):
    """Its steps are processes; here they only say that they ran, and what failed fails the whole."""
    ran: list[list[str]] = []
    fails: set[str] = set()

    def run(command, **options):
        ran.append(command)
        assert 0 < options["timeout"] <= 60 * 8
        return subprocess.CompletedProcess(command, int(any(word in fails for word in command)), "gpu H200")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    find = gpu_check.importlib.util.find_spec
    monkeypatch.setattr(
        gpu_check.importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
    for failing in (None, tests, "--verify", "--minutes", "experiments.benchmarks.generate"):
        fails = {failing}
        ran.clear()
        with pytest.raises(SystemExit) as ended:
            gpu_check.main()
        assert ended.value.code == int(failing is not None)
        _, *tested, compared, measured, generated = ran
        assert len(tested) == (tests == "tests/kernels")
        assert tests in [*tested, compared][0]
        assert "--verify" in compared
        assert "experiments.benchmarks.kernels" in measured
        assert "--verify" not in measured
        assert "experiments.benchmarks.generate" in generated
        for command in (measured, generated):
            assert ("--smoke" in command) == ("--smoke" in arguments)
        assert ("here.csv" in measured) == ("here.csv" in arguments)
        named = "generation_here.csv" if "here.csv" in arguments else "results/generation_h200.csv"
        assert ("--csv" in generated) == ("--smoke" not in arguments)
        assert "--csv" not in generated or generated[-1].endswith(named)


@pytest.mark.parametrize(
    ("slow", "code", "said"),
    [
        ("tests/kernels", gpu_check.INCOMPLETE, "tests incomplete, comparison with float64 passed"),
        ("--verify", 0, "tests passed, comparison with float64 incomplete"),
        ("experiments.benchmarks.generate", 0, "tests passed, comparison with float64 passed"),
    ],
)
def test_what_time_did_not_suffice_for_has_not_passed(slow, code, said, monkeypatch, capsys):
    def run(command, **options):
        if slow in command:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, 0, "gpu H200")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == code
    printed = capsys.readouterr().out
    assert said in printed
    assert "left out, no time: " in printed


def test_nothing_optional_is_imported():
    """A machine for `make gpu-check` has none of these, and runs the tests of kernels."""
    tests = sorted(path.stem for path in pathlib.Path(__file__).parents[1].glob("kernels/test_*.py"))
    assert len(tests) > 8
    code = (
        "import sys\n"
        "from experiments.benchmarks import generate, gpu_check, kernels\n"
        f"sys.path.insert(0, {str(pathlib.Path(__file__).parents[1])!r})\n"
        f"import conftest, kernels.conftest, {', '.join(f'kernels.{name}' for name in tests)}\n"
        "absent = 'tensorflow', 'clu', 'ml_collections', 'tensorflow_datasets', 'matplotlib', 'torch', "
        "'tokenizers'\n"
        "sys.exit(', '.join(name for name in absent if name in sys.modules) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
