"""Collectives of compiled programs, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from sol_jax.planning.compiled import count_collectives, of_executable

TURNS = 'backend_config={"known_trip_count":{"n":"%d"}}'
HLO = """\
HloModule made_up

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %r = f32[4,2]{1,0:T(8,128)} all-reduce(%p), replica_groups={}, to_apply=%add
  ROOT %t = (s32[], f32[4]{0}) tuple(%p)
}

%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %w = (s32[], f32[4]{0}) while(%p), condition=%cond, body=%inner, FIVE
  %g = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%p), dimensions={0}
  ROOT %d = bf16[32]{0} all-gather-done(%g)
}

%never (p: f32[4]) -> f32[4] {
  ROOT %r = f32[1000]{0} all-reduce(%p), to_apply=%add
}

ENTRY %main (q: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%q), condition=%cond, body=%outer, THREE
  ROOT %c = (u16[10]{0}, pred[6]{0}) all-to-all(%q, %q), dimensions={0}
}
""".replace("FIVE", TURNS % 5).replace("THREE", TURNS % 3)


def test_collectives_of_loops_count_as_often_as_they_run():
    assert count_collectives(HLO) == {
        "all-reduce": (3 * 5, 3 * 5 * 8 * 4.0),
        "all-gather": (3, 3 * 32 * 2.0),  # one that is started has its operand in front
        "all-to-all": (1, 10 * 2.0 + 6.0),
    }
    assert count_collectives(HLO.replace("known_trip_count", "unknown"))["all-reduce"][0] == 1


def test_what_a_program_takes():
    def doubled(x: jax.Array) -> jax.Array:
        return 2 * jnp.sort(x)

    x = jax.ShapeDtypeStruct((1 << 16,), jnp.float32)
    found = of_executable(jax.jit(doubled, donate_argnums=0).lower(x).compile(), 1.0)
    assert (found.arguments, found.outputs, found.aliased) == (4 << 16, 4 << 16, 4 << 16)
    assert found.total == (4 << 16) + found.temporaries
    assert found.collectives == {}
    kept = of_executable(jax.jit(doubled).lower(x).compile(), 1.0)
    assert kept.total - kept.temporaries == pytest.approx(2 * 4 << 16)
