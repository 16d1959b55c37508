"""Which implementation runs, what is said when none can, and what all kernels share."""

import dataclasses
import importlib.metadata
import logging
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.lowering import lowers
from pallas_kernels import dispatch, native, pallas_triton
from pallas_kernels.attention import attend, paged_attention
from pallas_kernels.dispatch import choose, no_gradient, tracing_for
from pallas_kernels.errors import UnavailableError
from pallas_kernels.gated_mlp import gated_hidden
from pallas_kernels.norm import rms_norm
from pallas_kernels.one_row import one_row
from pallas_kernels.prune import keep_channels, norm_prune
from pallas_kernels.quantize import fake_quantize, quantize_residual
from pallas_kernels.quest import page_bounds, select_pages
from pallas_kernels.shapes import SHAPES, distinct, named
from pallas_kernels.tuning import TABLE


@pytest.fixture
def measured(monkeypatch):
    """A table in which kernels for GPUs were measured to pay; in ours none has been timed yet."""
    made_up = {
        "keep_channels": {},
        "gated_hidden": {"rows": (1, 2), "hidden": range(2048, 9999)},
        "attend": {},
        "paged_attention": {"tokens": range(16384, 99999)},
    }
    for op, pays in made_up.items():
        kernel = dataclasses.replace(TABLE[op, "pallas", "gpu"], pays=pays)
        monkeypatch.setitem(TABLE, (op, "pallas", "gpu"), kernel)


def test_auto_takes_nothing_unmeasured():
    """Kernels that were timed nowhere are for those who name them."""
    assert {platform for (_, _, platform), kernel in TABLE.items() if kernel.pays is not None} == {"cpu"}


def test_auto_goes_by_platform_and_shape(measured):
    for auto in (None, "auto"):
        assert choose("gated_hidden", auto, platform="cpu", rows=64, hidden=4096) == "xla"
        assert choose("gated_hidden", auto, platform="cuda", rows=1, hidden=4096) == "pallas"
        assert choose("gated_hidden", auto, platform="gpu", rows=8, hidden=4096) == "xla"
        assert choose("gated_hidden", auto, platform="gpu", rows=1, hidden=576) == "xla"
        assert choose("keep_channels", auto, platform="gpu", hidden=576) == "pallas"
        assert choose("keep_channels", auto, platform="gpu", hidden=1 << 20) == "xla"
        assert choose("keep_channels", auto, platform="tpu", hidden=576) == "xla"  # only when named


def test_named_implementations_run():
    for platform in ("cpu", "gpu", "tpu"):
        for name in ("xla", "pallas"):
            assert choose("gated_hidden", name, platform=platform, rows=8, hidden=576, ffn=1536) == name


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_what_a_platform_traces_for(platform):
    here = dispatch.current_platform()
    with tracing_for("cuda" if platform == "gpu" else platform):
        assert dispatch.current_platform() == platform
        assert not dispatch.interpret()
        with tracing_for("cpu"):
            assert dispatch.interpret()
        assert dispatch.current_platform() == platform
    assert dispatch.current_platform() == here


def refused(op: str, implementation: str, **facts) -> str:
    with pytest.raises(UnavailableError) as caught:
        choose(op, implementation, **facts)
    return str(caught.value)


def test_refusals_say_what_why_and_what_instead():
    assert refused("gated_hidden", "triton", platform="cpu") == (
        "gated_hidden: 'triton' cannot run on this platform (cpu) because jax-triton has no interpreter; "
        "use 'pallas' (interpreted) or 'xla' instead"
    )
    assert refused("gated_hidden", "triton", platform="tpu") == (
        "gated_hidden: 'triton' cannot run on this platform (tpu) because it has no tpu kernel; "
        "use 'pallas' or 'xla' instead"
    )
    assert refused("keep_channels", "pallas", platform="tpu", hidden=20000) == (
        "keep_channels: 'pallas' cannot take this shape because hidden is 20000 and must be 1 to 16384; "
        "use 'xla' instead"
    )
    assert "because ffn is 1500 and must be at least 128 in steps of 128;" in refused(
        "gated_hidden", "pallas", platform="tpu", hidden=576, ffn=1500
    )
    with pytest.raises(
        ValueError, match="implementation 'cuda' is none of auto, xla, pallas, triton, native"
    ):
        choose("keep_channels", "cuda")


@pytest.fixture
def installed(monkeypatch):
    """Sets the versions of jax and packages that the process believes in."""

    def install(jax_version: str, **versions: str) -> None:
        def version(package: str) -> str:
            if (found := versions.get(package.replace("-", "_"))) is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return found

        monkeypatch.setattr(jax, "__version__", jax_version)
        monkeypatch.setattr(importlib.metadata, "version", version)
        dispatch.triton_problem.cache_clear()

    yield install
    monkeypatch.undo()
    dispatch.triton_problem.cache_clear()


def test_triton_of_every_version(installed):
    installed("0.10.2")
    said = refused("gated_hidden", "triton", platform="gpu", rows=1)
    assert "because jax 0.10.2 needs jax-triton >= 0.3.1 and there is none" in said
    assert said.endswith("use 'pallas' or 'xla' instead")
    installed("0.10.2", jax_triton="0.3.0", triton="3.9.0")
    assert "needs jax-triton >= 0.3.1 and this is 0.3.0" in refused("gated_hidden", "triton", platform="gpu")
    installed("0.10.2", jax_triton="0.3.1", triton="3.5.1")
    assert "needs triton >= 3.6 and this is 3.5.1" in refused("gated_hidden", "triton", platform="gpu")
    installed("0.11.2", jax_triton="0.3.1", triton="3.9.0")
    assert "jax 0.11.2 needs jax-triton >= 0.4.1" in refused("gated_hidden", "triton", platform="gpu")
    for versions in (("0.10.2", "0.3.1", "3.6.0"), ("0.11.0", "0.4.1", "3.10.0")):
        installed(versions[0], jax_triton=versions[1], triton=versions[2])
        assert choose("gated_hidden", "triton", platform="gpu", rows=1) == "triton"


def test_a_jax_without_pallas_through_triton(monkeypatch, measured):
    """Its removal is announced: the kernels are refused by name, auto takes XLA, and TPUs keep theirs."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.setattr(pallas_triton, "plgpu", pallas_triton.find())
    for platform in ("cpu", "gpu"):
        assert refused("gated_hidden", "pallas", platform=platform, rows=1) == (
            f"gated_hidden: 'pallas' cannot run on this platform ({platform}) because jax {jax.__version__} "
            "has no Pallas through Triton any more (jax 0.12 has); use 'xla' instead"
        )
    assert choose("gated_hidden", "auto", platform="gpu", rows=1, hidden=4096) == "xla"
    assert choose("gated_hidden", "pallas", platform="tpu", rows=8, hidden=576, ffn=1536) == "pallas"
    with pytest.raises(
        UnavailableError, match=r"cannot use load because jax .* has no Pallas through Triton"
    ):
        pallas_triton.plgpu.load(None)


def test_what_is_left_of_triton_without_pallas(monkeypatch, told, jax_triton):
    """Its own kernels, and XLA for all else; without a word of it nobody would know, so it is logged."""
    monkeypatch.setattr(pallas_triton, "plgpu", pallas_triton._Gone())
    with tracing_for("gpu"):
        assert [dispatch.without_triton(name) for name in ("triton", "xla", None)] == ["xla", "xla", None]
        assert choose("gated_hidden", "triton", rows=1, hidden=4096) == "triton"
        assert choose("paged_attention", "triton", rows=4) == "triton"
    assert "triton is xla where jax-triton has no kernel, for jax" in told.text
    for platform in ("cpu", "tpu"):  # where Pallas' kernels need no Triton, or triton is refused
        with tracing_for(platform):
            assert dispatch.without_triton("triton") == "pallas"


def test_the_package_is_imported_without_pallas_through_triton():
    program = (
        "import sys; sys.modules['jax.experimental.pallas.triton'] = None; import sol_jax.generate; "
        "from pallas_kernels import pallas_triton; assert pallas_triton.problem()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture
def told(caplog):
    """What dispatch logs, of which nothing has been logged before."""
    caplog.set_level(logging.DEBUG, logger="pallas_kernels.dispatch")
    dispatch._log_new.cache_clear()
    return caplog


def test_auto_logs_each_pick_once(told, measured):
    for _ in range(3):
        choose("gated_hidden", None, platform="gpu", rows=2, hidden=3072)
    choose("gated_hidden", None, platform="gpu", rows=3, hidden=3072)
    choose("gated_hidden", "pallas", platform="gpu", rows=3, hidden=3072)
    choose("attend", "auto", platform="tpu")
    assert told.messages == [
        "auto picks pallas for gated_hidden on gpu (hidden=3072, rows=2)",
        "auto picks xla for gated_hidden on gpu (hidden=3072, rows=3)",
        "auto picks xla for attend on tpu",
    ]


def test_a_kernel_that_is_asked_for_again_is_not_logged(told, measured):
    """XLA is final, a kernel is not before the rows are known."""
    for hidden in (576, 4096):
        choose("gated_hidden", "auto", platform="gpu", hidden=hidden, asks_again=True)
    assert told.messages == ["auto picks xla for gated_hidden on gpu (hidden=576)"]


def test_nothing_is_logged_by_default(told, measured):
    told.set_level(logging.INFO, logger="pallas_kernels.dispatch")
    choose("gated_hidden", "auto", platform="gpu", rows=2, hidden=3072)
    assert told.messages == []
    told.set_level(logging.DEBUG, logger="pallas_kernels.dispatch")
    choose("gated_hidden", "auto", platform="gpu", rows=2, hidden=3072)
    assert len(told.messages) == 1  # what was not said does not count as said


@pytest.mark.parametrize(
    ("platform", "name", "expected"),
    [
        (
            "cuda",
            "auto",
            [
                "auto picks xla for paged_attention on gpu (rows=3)",
                "auto picks xla for paged_attention on gpu (rows=15)",
                "auto picks pallas for gated_hidden on gpu (rows=1)",
                "auto picks xla for gated_hidden on gpu (rows=5)",
            ],
        ),
        ("tpu", "auto", ["auto picks xla for attend on tpu", "auto picks xla for gated_hidden on tpu"]),
        ("cuda", "pallas", ["gated_hidden is dense, for pallas takes 3 rows at most (rows=5)"]),
        ("cuda", "xla", []),
    ],
)
def test_what_ops_log(platform, name, expected, told, measured):
    """A pick is logged with its rows: under vmap for one first, and last for all, which are what runs."""
    gate, q, keep = jnp.ones((2048, 128)), jnp.ones((5, 2, 3, 8)), jnp.ones((1, 1, 5), bool)

    def step(x, kv):
        def attended(q):
            own = jnp.ones((1, 1, 40), bool)
            return attend(q, (kv, kv), (kv, kv), keep, own, jnp.int32(40), 8, implementation=name)

        return jax.vmap(attended)(q), jax.vmap(lambda x: gated_hidden(x, gate, gate, name))(x)

    args = jax.ShapeDtypeStruct((5, 2048), jnp.float32), jax.ShapeDtypeStruct((2, 40, 8), jnp.float32)
    called = {"list_pages", "attend_pages"} if name == "pallas" else set()
    lowers(step, *args, platform=platform, kernels=called)
    rows = (re.search(r"rows=\d+", message) for message in told.messages)
    said = [
        message.split(" (")[0] + (f" ({found[0]})" if found else "")
        for message, found in zip(told.messages, rows, strict=True)
    ]
    assert said == expected


@pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))
def test_what_a_cpu_takes_for_any_rows_is_logged_at_once(told):
    q, kv = jnp.ones((2, 3, 8)), jnp.ones((2, 40, 8))
    every, own = jnp.ones((1, 1, 5), bool), jnp.ones((1, 1, 40), bool)
    with tracing_for("cpu"):
        jax.eval_shape(lambda: attend(q, (kv, kv), (kv, kv), every, own, jnp.int32(40), 8))
        jax.eval_shape(lambda: select_pages(q, (jnp.ones((2, 5, 16)),), (jnp.ones(5, bool),), jnp.int32(2)))
    assert [message.split(" (")[0] for message in told.messages] == [
        "auto picks native for attend on cpu",
        "auto picks native for select_pages on cpu",
    ]


@pytest.fixture
def gpu(monkeypatch):
    """Makes the process believe that its device is a GPU."""

    def plug_in(kind: str, capability: str) -> None:
        device = types.SimpleNamespace(device_kind=kind, compute_capability=capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])

    return plug_in


def test_gpus_without_kernels(gpu, measured):
    """An old one of NVIDIA's and one of AMD's: refused by name, and never picked."""
    gpu("NVIDIA H200", "9.0")
    assert dispatch.current_platform() == "gpu"
    assert choose("gated_hidden", "auto", rows=1, hidden=4096) == "pallas"
    gpu("Tesla T4", "7.5")
    assert refused("gated_hidden", "pallas", rows=1, hidden=4096) == (
        "gated_hidden: 'pallas' cannot run on this platform (gpu) because this Tesla T4 has compute "
        "capability 7.5 and the kernels need 8.0; use 'xla' instead"
    )
    assert choose("gated_hidden", "auto", rows=1, hidden=4096) == "xla"
    gpu("AMD Instinct MI300X", "gfx942")
    assert dispatch.current_platform() == "rocm"
    assert refused("fake_quantize", "pallas", hidden=64) == (
        "fake_quantize: 'pallas' cannot run on this platform (rocm) because it has no rocm kernel; "
        "use 'xla' instead"
    )
    assert choose("fake_quantize", "auto", hidden=64) == "xla"


def test_numbers_that_no_kernel_takes(measured):
    """Found by the ops themselves, from the arrays that they are given."""
    half, whole = jnp.ones((2, 16), jnp.float16), jnp.ones((2, 16), jnp.int8)
    sentence = (
        "^{}: 'pallas' cannot take numbers of this type because dtype is float16 and must be float32 or "
        "bfloat16; use 'xla' instead"
    )
    q, kv, pages = jnp.ones((2, 1, 8)), (jnp.ones((2, 16, 8), jnp.float16),) * 2, jnp.ones((1, 1, 2), bool)
    calls = {
        "keep_channels": lambda: keep_channels(half, jnp.ones(2), "pallas"),
        "norm_prune": lambda: norm_prune(half[0], half[0], 1e-5, jnp.float32(1), "pallas"),
        "fake_quantize": lambda: fake_quantize(half, jnp.full(2, 5), "pallas"),
        "quantize_residual": lambda: quantize_residual(half[0], 5, half[0], half[0], 1e-5, "pallas"),
        "gated_hidden": lambda: gated_hidden(half[0], jnp.ones((16, 128), jnp.float16), half, "pallas"),
        "page_bounds": lambda: page_bounds(kv[0], jnp.ones(16, bool), 8, "pallas"),
        "select_pages": lambda: select_pages(
            q.astype(jnp.float16), (kv[0],), (jnp.ones(16, bool),), jnp.int32(1), implementation="pallas"
        ),
        "paged_attention": lambda: paged_attention(
            q.astype(jnp.float16), kv, pages, jnp.int32(16), 8, implementation="pallas"
        ),
    }
    for op, call in calls.items():
        with tracing_for("tpu"), pytest.raises(UnavailableError, match=sentence.format(op)):
            call()
    with (
        tracing_for("cuda"),
        pytest.raises(UnavailableError, match=r"dtype is int8 .* or float16; use 'xla'"),
    ):
        keep_channels(whole, jnp.ones(2), "pallas")
    assert choose("keep_channels", "auto", platform="gpu", hidden=64, dtype="float64") == "xla"


def test_table_is_of_known_names():
    assert {platform for _, _, platform in TABLE} == {"cpu", "gpu", "tpu"}
    assert {name for _, name, _ in TABLE} == {"pallas", "triton", "native"}


# --- shapes -------------------------------------------------------------------------------------


def test_shapes():
    assert len({str(shape) for shape in SHAPES}) == len(SHAPES)
    for shape in SHAPES:
        assert shape.group_size * shape.kv_heads == shape.heads
        assert shape.context % shape.page_size == 0
    assert {shape.batch for shape in SHAPES} == {1, 8, 128}
    assert len(distinct("hidden", "batch")) == 4 * 3
    assert len(distinct("name", "page_size")) == 7  # training's, and longer ones for generation
    assert all(named(str(shape)) is shape for shape in SHAPES)
    assert distinct("name")[0] is SHAPES[0]


# --- the frozen model has no gradient -----------------------------------------------------------


def test_a_gradient_is_an_error_that_names_the_op():
    double = no_gradient("double", lambda x: (2 * x, jnp.int32(1)))
    assert double(3.0)[0] == 6.0
    np.testing.assert_array_equal(jax.vmap(double)(jnp.arange(3.0))[0], [0.0, 2.0, 4.0])
    for derivative in (jax.grad, jax.jacfwd):
        for fn in (double, jax.jit(double), jax.vmap(double)):
            with pytest.raises(TypeError, match=r"^double: no gradient goes through it"):
                derivative(lambda x, fn=fn: jnp.sum(fn(x)[0]))(jnp.ones(2))
    # What does not depend on the variable may be there.
    assert jax.grad(lambda y: y * double(jnp.float32(3.0))[0])(1.0) == 6.0


# --- rows ---------------------------------------------------------------------------------------


def test_all_vmaps_are_one_call():
    calls = []

    def rows(x_NxD, scale_N, shared_D):
        calls.append(x_NxD.shape)
        return x_NxD * scale_N[:, None] + shared_D, scale_N

    x = jnp.arange(24.0).reshape(2, 3, 4)
    scale, shared = jnp.arange(3.0), jnp.arange(4.0)
    both = jax.vmap(jax.vmap(one_row(rows, num_shared=1), (0, 0, None)), (0, None, None))
    out, kept = jax.jit(both)(x, scale, shared)
    assert calls[-1] == (6, 4)
    np.testing.assert_array_equal(out, x * scale[:, None] + shared)
    np.testing.assert_array_equal(kept, jnp.broadcast_to(scale, (2, 3)))


def test_batched_weights_run_one_after_another():
    x, scale, weights = jnp.arange(12.0).reshape(3, 4), jnp.arange(3.0), jnp.arange(8.0).reshape(2, 4)
    rows = jax.vmap(one_row(lambda x, s, w: x * s[:, None] + w, num_shared=1), (0, 0, None))
    out = jax.vmap(rows, (None, None, 0))(x, scale, weights)
    np.testing.assert_array_equal(out, x * scale[:, None] + weights[:, None])


def test_rms_norm_by_hand():
    np.testing.assert_allclose(rms_norm(jnp.array([3.0, -4.0]), jnp.array([1, 2]), 12.5), [0.6, -1.6])


# --- lowering -----------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowering_without_a_kernel_is_noticed(platform):
    args = jax.ShapeDtypeStruct((576,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    lowers(
        lambda x, keep: keep_channels(x, keep, "pallas"), *args, platform=platform, kernels={"keep_channels"}
    )
    with pytest.raises(AssertionError, match="these kernels were called: none"):
        lowers(
            lambda x, keep: keep_channels(x, keep, "xla"), *args, platform=platform, kernels={"keep_channels"}
        )
